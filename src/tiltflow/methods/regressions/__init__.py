"""Regressions at samples that are noised afresh, which several methods share."""
