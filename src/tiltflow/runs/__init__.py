"""A recipe, the folder of a run, and what is done with one."""
