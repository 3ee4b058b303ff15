"""What the verbs share: the app, its options and exit codes, progress, and how results are printed."""
