"""A tiny run whose tuned weights are far from those of its base, in every tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_recipe

from tiltflow import load
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.settings import read_yaml, validate
from tiltflow.streams import stream


def parted(folder: Path) -> Path:
    """Train it; returns its folder, `run` in `folder`."""
    recipe = tiny_recipe(folder, training={"max_train_steps": 1, "train_batch_size": 4})
    run(validate(Recipe, read_yaml(recipe), "r"), folder / "run")
    tuned = load(folder / "run")
    generator = stream(0, "moved")
    with torch.no_grad():
        for parameter in tuned.flow.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tuned.save(folder / "run" / "model")
    return folder / "run"
