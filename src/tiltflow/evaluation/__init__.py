"""Evaluation of samples: estimates with their errors, tests against the target law, the alarm."""
