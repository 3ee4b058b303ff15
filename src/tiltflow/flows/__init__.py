"""A network seen as a velocity field on the linear path."""
