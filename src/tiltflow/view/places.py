"""Folders that the page shows: runs, sweeps, comparisons, stages, and folders of them, each by a key and never by a path."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tiltflow.errors import InputError
from tiltflow.files import PARTIAL, final_name
from tiltflow.runs.lock import HOLDER, Holder
from tiltflow.training.records import METRICS

Kind = Literal["run", "sweep", "comparison", "stages", "folder"]
State = Literal["training", "waiting", "finished", "stopped"]
MARKS: dict[str, Kind] = {
    "stages.json": "stages",
    "sweep.yaml": "sweep",
    "compare.yaml": "comparison",
    METRICS: "run",
    "summary.json": "run",
    "recipe.yaml": "run",
}
"""The file by which a folder is known, in the order in which they are looked for."""
DEPTH = 3
"""Folders within folders in which runs are found: a comparison has runs/<subject>/<method>."""


@dataclass(frozen=True)
class Place:
    """A folder that is shown.

    Args:
        key: its name, and those of the folders around it, from what the user named on.
        named: of the place of all that the user named, these.
    """

    key: str
    path: Path
    kind: Kind
    named: tuple[Place, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the key."""
        return final_name(self.path)

    @property
    def state(self) -> State:
        """Of a run: whether it is being trained, is about to be, is finished, or was stopped."""
        if (self.path / "summary.json").exists() and not in_work(self.path):
            return "finished"
        if in_work(self.path):
            return "training" if (self.path / METRICS).exists() else "waiting"
        return "stopped"


def in_work(path: Path) -> bool:
    """Whether a process works in a folder. On another host that is not known, and assumed."""
    holder = Holder.read(path / HOLDER)
    return holder is not None and (holder.host != socket.gethostname() or holder.is_alive())


def kind_of(path: Path) -> Kind | None:
    """The kind of a folder; None if there is nothing to show in it."""
    for name, kind in MARKS.items():
        if (path / name).is_file():
            return kind
    return None


def folders(path: Path) -> list[Path]:
    """The folders in a folder, by name; links are not followed."""
    try:
        inside = [each for each in path.iterdir() if not each.name.startswith(".") and not each.is_symlink() and each.is_dir()]
    except OSError:
        return []
    return sorted(inside, key=lambda each: each.name)


def within(place: Place, depth: int = DEPTH) -> Iterator[Place]:
    """Runs, sweeps, .. in a folder; not those in these."""
    for each in place.named:
        if each.kind != "folder":
            yield each
        else:
            yield from within(each, depth)
    for path in folders(place.path) if depth and not place.named else ():
        kind, key = kind_of(path), f"{place.key}/{final_name(path) if path.name.endswith(PARTIAL) else path.name}"
        if kind is not None:
            yield Place(key, path, kind)
        else:
            yield from within(Place(key, path, "folder"), depth - 1)


class Places:
    """What the user has named.

    Raises InputError if there is nothing to show in one of them.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.named: list[Place] = []
        for path in paths:
            if not path.is_dir():
                raise InputError(f"{path}: {'is not a folder' if path.exists() else 'there is no such folder'}")
            kind = kind_of(path)
            if kind is None and next(within(Place("", path, "folder")), None) is None:
                raise InputError(
                    f"{path}: holds no run, sweep or comparison, as `tiltflow train`, sweep and compare write them"
                )
            self.named.append(Place(self._new_key(path), path, kind or "folder"))

    def _new_key(self, path: Path) -> str:
        name, known = path.resolve().name or "runs", {place.key for place in self.named}
        return next(key for key in (name, *(f"{name}-{i}" for i in range(2, len(known) + 3))) if key not in known)

    @property
    def first(self) -> Place:
        """What the page begins with: what was named, or all of it."""
        return self.named[0] if len(self.named) == 1 else Place("", Path("runs"), "folder", tuple(self.named))

    def find(self, key: str) -> Place | None:
        """The place of a key; None if there is none, or not any more. What lies in a place is found by going through it, so a
        key leads nowhere else."""
        if not key:
            return self.first
        for place in self.named:
            if place.key == key:
                kind = kind_of(place.path)
                return Place(key, place.path, kind or "folder") if place.path.is_dir() else None
            if key.startswith(f"{place.key}/"):
                return next((each for each in everything(place) if each.key == key), None)
        return None


def everything(place: Place, depth: int = 2) -> Iterator[Place]:
    """What is in a place, and in that: a folder has sweeps, which have runs."""
    for each in within(place):
        yield each
        if depth:
            yield from everything(each, depth - 1)


def runs_of(place: Place) -> list[Place]:
    """The runs to draw curves of: of a run itself, else those in it."""
    return [place] if place.kind == "run" else [each for each in within(place) if each.kind == "run"]
