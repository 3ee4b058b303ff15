"""The command line, one file a verb: `tiltflow evaluate` is the function `evaluate` of `evaluate.py`.

A new file in this folder is a new verb. `terminal/` holds what the verbs share.
"""
