"""Stages: an outer loop of tuning for a utility of the whole law, its recipes, and the folder that it fills"""
