"""`python -m tiltflow`."""

from tiltflow.cli import main

main()
