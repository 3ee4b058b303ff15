"""The larger models that ship with tiltflow, in a distribution of their own; `tiltflow.load` finds them by name."""
