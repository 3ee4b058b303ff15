"""Base models from data."""
