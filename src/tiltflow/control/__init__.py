"""What methods compute along trajectories."""
