"""`python -m tiltflow`."""

import os
import sys

if sys.path[0] in ("", os.getcwd()):
    del sys.path[0]  # Python puts it first: nothing in the current directory may hide an installed package

from tiltflow.commands.terminal.app import main

main()
