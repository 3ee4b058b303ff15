"""`tiltflow compare`: methods on the same problems and recipes, with the same seeds, under one budget."""
