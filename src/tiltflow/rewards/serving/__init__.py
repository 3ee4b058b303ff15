"""The server side of reward `http`: it scores with any reward of a recipe."""
