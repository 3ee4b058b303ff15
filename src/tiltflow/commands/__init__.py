"""The command line, one file a verb: `tiltflow evaluate` is the function `evaluate` of `evaluate.py`.

A new file in this folder is a new verb. `terminal/` has the code that verbs share.
"""
