"""What is measured of samples: estimates with their errors, tests, the alarm."""
