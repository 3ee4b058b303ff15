"""Closed forms: target laws, optimal controls, and the laws that methods reach."""
