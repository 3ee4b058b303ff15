"""Reward functions: lifted from the user's code, bound to prompts, called and checked."""
