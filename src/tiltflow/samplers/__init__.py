"""How a velocity field becomes samples."""
