"""`tiltflow advise`: which method, temperature and settings suit a recipe's model and reward, and why."""
