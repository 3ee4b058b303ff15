"""Kinds of pretraining, one file each, named as `task` in a recipe: its settings, `RECIPE`, and the task that they describe"""
