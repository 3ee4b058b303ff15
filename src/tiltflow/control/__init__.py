"""Quantities that methods compute along trajectories."""
