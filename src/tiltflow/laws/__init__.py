"""Closed forms: laws that are aimed at, and what reaches them."""
