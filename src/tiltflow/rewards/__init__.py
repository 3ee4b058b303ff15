"""Rewards, one file each: a class of settings named after the file, with `build()`. A new reward is a new file.

`build(device)` loads what the reward needs and returns a plain function: images [batch, channels, height, width] in [-1, 1]
-> [batch] floats, higher is better, no sample looking at its neighbours. Three attributes of the settings say what the
numbers are: `unit`, `description` (one line for the report: what is measured, its range and sign) and `differentiable`.
Some of them depend on the settings, so read them on an instance.
"""
