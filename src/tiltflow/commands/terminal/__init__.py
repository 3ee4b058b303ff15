"""Code that the verbs share: the app, options, exit codes, progress, and printing of results."""
