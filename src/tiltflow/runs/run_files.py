"""The files of a run by name, reading them, and refusing folders that hold something else."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from tiltflow.errors import InputError, Note
from tiltflow.files import write_text
from tiltflow.runs.lock import HOLDER, LOCK
from tiltflow.settings import dump_yaml, read_yaml
from tiltflow.training.optimizer import move_old_keys
from tiltflow.training.records import METRICS, known_records

RECIPE, MODEL, DIAGNOSTICS, TRACEBACK = "recipe.yaml", "model", "diagnostics", "traceback.txt"
OF_TRACKERS = ("logs", "wandb")
"""Folders in a run that experiment trackers write."""


def claim(folder: Path) -> None:
    """Raise InputError if `folder` holds anything but the lock and diagnostics, which a run that failed at once leaves."""
    if inside(folder):
        run = (folder / RECIPE).exists()
        hint = "; to resume the run that is there, add --resume" if run else ""
        raise InputError(f"{folder}: already holds something; give a new --output, nothing was overwritten{hint}")


def inside(folder: Path) -> list[Path]:
    """The content of a folder, except for the lock and diagnostics."""
    return [path for path in folder.iterdir() if path.name not in (DIAGNOSTICS, LOCK, HOLDER)]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The intact lines of `metrics.jsonl`; a warning gives the number of damaged ones. A last line that a killed process did
    not finish is left out.

    Raises InputError if there are none.
    """
    rows, damaged = known_records(folder)
    if not rows:
        raise InputError(f"{folder / METRICS}: holds no step of a training run")
    if damaged:
        warnings.warn(f"{folder / METRICS}: {damaged} lines are damaged and left out", Note, stacklevel=2)
    return rows


def read_run_tree(folder: Path) -> dict[str, Any]:
    """The recipe of a run, not yet validated. Raises InputError if `folder` is not a run with a tuned model."""
    for needed in (RECIPE, MODEL, METRICS):
        if not (folder / needed).exists():
            raise InputError(f"{folder}: not a run folder, it has no {needed}")
    refuse_links(folder)
    return move_old_keys(read_yaml(folder / RECIPE))


def refuse_links(folder: Path) -> None:
    """Raise InputError if a run contains a link: its target, outside the run, could be overwritten or uploaded."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in OF_TRACKERS]
        for name in (*folders, *files):
            if (path := Path(place, name)).is_symlink():
                raise InputError(f"{path}: is a link, and links are not followed; put its target in its place")


def write_yaml(path: Path, tree: Any) -> None:
    """Write YAML atomically, and flush it onto the disk. Raises OutputError."""
    write_text(path, dump_yaml(tree), durable=True)
