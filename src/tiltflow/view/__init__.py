"""The page of `tiltflow view`: runs, sweeps and comparisons, served on 127.0.0.1 while they train."""
