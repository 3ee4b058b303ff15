"""A data set of play in an environment, episode by episode in processes of their own, and its rewards for a task.

Each episode is a file in a folder beside the output until all are there, so that an interrupted generation goes on where it
was. Episodes depend on their number and the seed, not on the number of processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiltflow.chemistry.workers import Crashed, Workers
from tiltflow.data import UNREADABLE
from tiltflow.errors import InputError
from tiltflow.files import check_output, read_json, write_file, write_json
from tiltflow.policies.environments import Arrays, make, play, rewards_of

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Play:
    """What is played.

    Args:
        environment: the name of one of `environments.ENVIRONMENTS`.
        episodes: how many.
        steps: rows of each, the last of which has no step.
        seed: of all of them.
    """

    environment: str
    episodes: int = 1000
    steps: int = 1001
    seed: int = 0


def generate(
    wanted: Play,
    output: Path,
    *,
    task: int = 1,
    sparse: bool = False,
    processes: int | None = None,
    watch: Callable[[int], None] = lambda done: None,
) -> Arrays:
    """Play, and write an .npz file in OGBench's format with the rewards and masks of a task. Returns its arrays.

    Args:
        sparse: rewards of -1 wherever the task is not over.
        processes: by default one to a core.
        watch: is told how many episodes are there.

    Raises InputError if the environment cannot be made, the file exists or cannot be written, or the folder beside it has
    episodes of another play.
    """
    if output.exists():
        raise InputError(f"--output {output}: exists; give another name, or --data to compute its rewards for another task")
    make(wanted.environment, task)
    check_output(output)
    folder = output.with_name(f"{output.stem}.episodes")
    _begin(folder, wanted)
    missing = [i for i in range(wanted.episodes) if not _file(folder, i).exists()]
    done = wanted.episodes - len(missing)
    items = [(wanted.environment, i, wanted.seed, wanted.steps, str(folder)) for i in missing]
    for answer in Workers(min(processes, len(items)) if processes and items else processes).map(write_episode, items):
        if isinstance(answer, Crashed):
            raise InputError(f"{wanted.environment}: a process that played an episode ended; run this again to go on")
        done += 1
        watch(done)
    episodes = [_read(_file(folder, i)) for i in range(wanted.episodes)]
    rows = {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}
    rows |= rewards_of(wanted.environment, task, rows, sparse=sparse)
    _save(output, rows)
    shutil.rmtree(folder)
    return rows


def relabel(data: Path, output: Path, environment: str, *, task: int, sparse: bool = False) -> Arrays:
    """Write a data set again, with the rewards and masks of another task. Returns its arrays.

    Raises InputError if the data cannot be read or are of another environment, or the output cannot be written.
    """
    make(environment, task)
    check_output(output)
    rows = _read(data)
    rows |= rewards_of(environment, task, rows, sparse=sparse)
    _save(output, rows)
    return rows


def write_episode(item: tuple[str, int, int, int, str]) -> None:
    """Play an episode into its file: (environment, number, seed, steps, folder)."""
    name, index, seed, steps, folder = item
    _save(_file(Path(folder), index), play(name, index, seed=seed, steps=steps))


def _begin(folder: Path, wanted: Play) -> None:
    place, settings = folder / SETTINGS, {key: value for key, value in vars(wanted).items() if key != "episodes"}
    if not place.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(place, settings)
    if (found := read_json(place)) != settings:
        told = ", ".join(f"{key} {value}" for key, value in found.items())
        raise InputError(f"{folder}: has episodes of another play ({told}); remove it, or go on with these settings")


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:06}.npz"


def _save(path: Path, rows: Arrays) -> None:
    def write(draft: Path) -> None:
        with open(draft, "wb") as file:
            np.savez_compressed(file, **rows)  # type: ignore[arg-type]

    write_file(path, write)


def _read(path: Path) -> Arrays:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            found: dict[str, Any] = {key: np.asarray(archive[key]) for key in archive.files}
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable .npz file ({error})") from None
    return found
