"""Ascent of the reward by its gradient: what the methods that ask for nothing else share."""
