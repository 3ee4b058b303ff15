"""Parts for tiltflow; see pyproject.toml."""
