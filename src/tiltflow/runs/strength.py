"""A run at any strength of its tilt: the base and what was tuned, loaded once, and the models between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tiltflow.errors import InputError
from tiltflow.models.sources.network import Network
from tiltflow.runs.run import load_run, read_run, sampled_at
from tiltflow.runs.run_files import RECIPE
from tiltflow.runs.staged.results import is_staged, load_stage, read_staged


def load_both(folder: Path, device: str = "cpu") -> tuple[Any, Any]:
    """(base, tuned) of a run, or of stages the first model and that of the last one, which `tiltflow.models.strength` mixes.
    Both are sampled by default as `tiltflow.load` samples the tuned one.

    Raises InputError if it is no run with a tuned model, if its base cannot be had, or if that has changed.
    """
    if not (folder / RECIPE).is_file():
        raise InputError(f"{folder}: is no training run, and so has no base: the strength of its tilt cannot be changed")
    if is_staged(folder):
        staged, rows = read_staged(folder)
        base, tuned = (sampled_at(staged.evaluation.first, each) for each in load_stage(staged, folder, len(rows), device))
        return base, tuned
    recipe = read_run(folder)
    base, tuned = load_run(recipe, folder, device)
    if isinstance(recipe.source, Network):
        return replace(base, sampling=tuned.sampling), tuned
    return sampled_at(recipe.evaluation.first, base), sampled_at(recipe.evaluation.first, tuned)
