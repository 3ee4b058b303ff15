"""The other end of reward `http`: a server that scores with any reward of a recipe."""
