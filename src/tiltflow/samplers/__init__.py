"""Solvers, grids and rollouts: from a velocity field to samples."""
