"""The one loop that verifies any method on any problem, and what problems share."""
