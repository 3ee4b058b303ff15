"""Policies: transitions of episodes, chunks of their actions, and what they return."""
