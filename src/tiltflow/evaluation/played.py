"""What is kept of the episodes that were played with a run: a folder for each task, with a line for each episode and strips of
frames of the first few.

episodes/cube-single-task-1/episodes.json    the task, and the episodes of each policy, `base` and `tuned`
episodes/cube-single-task-1/tuned-0.webp     frames of the first episode of the tuned policy, side by side
"""

# Mutation tests: test_played.py

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tiltflow.evaluation.episodes import Episode
from tiltflow.files import read_json, trusted, write_folder, write_json, writing
from tiltflow.policies.drawing import FRAMES, Film, Picture, evenly

FOLDER, FILE = "episodes", "episodes.json"
SIDE, GAP, QUALITY = 160, 2, 70
"""Pixels of the longer side of a frame, pixels between two, and WebP's quality."""
MOST_PLACES = 100
"""Places of a path that are kept, evenly spaced."""
POLICIES = ("base", "tuned")
AGAIN = "`tiltflow evaluate-policy`"


@dataclass(frozen=True)
class Seen:
    """An episode with what was seen of it.

    Args:
        strip: frames side by side, a .webp; None if there are none.
        path: in place of frames, the first two numbers of what was observed; or one, if there are no two.
        steps: at which these were.
    """

    episode: Episode
    strip: bytes | None = None
    path: tuple[tuple[float, ...], ...] = ()
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Played:
    """The episodes of a task.

    Args:
        task: number of the task; None of an environment of the user's own.
        best_of: of so many chunks the tuned policy took the one that the critics value most.
        iterations: of the run, when its policy was played.
        policies: of `POLICIES` those that were played, all of them from the same beginnings.
    """

    environment: str
    task: int | None
    seed: int
    best_of: int
    iterations: int | None
    policies: Mapping[str, Sequence[Seen]]

    @property
    def title(self) -> str:
        """The task in words."""
        return self.environment if self.task is None else f"{self.environment}, task {self.task}"

    @property
    def folder(self) -> str:
        """The name of its folder."""
        name = re.sub(r"[^\w-]+", "-", self.environment)
        return name if self.task is None else f"{name}-task-{self.task}"


def seen(episodes: Sequence[Episode], films: Sequence[Film]) -> list[Seen]:
    """Episodes, the first of them with their films."""
    return [_with(each, film) for each, film in zip(episodes, films, strict=False)] + [
        Seen(each) for each in episodes[len(films) :]
    ]


def _with(episode: Episode, film: Film) -> Seen:
    if steps := evenly(film.frames, FRAMES):
        return Seen(episode, strip_of([film.frames[step] for step in steps]), steps=tuple(steps))
    last = len(film.path) - 1
    steps = sorted({*range(0, last, -(-len(film.path) // MOST_PLACES)), last})
    return Seen(episode, path=tuple(tuple(film.path[step]) for step in steps), steps=tuple(steps))


def strip_of(frames: Sequence[Picture]) -> bytes:
    """Frames of one size side by side, made smaller, as a .webp."""
    scale = min(1.0, SIDE / max(frames[0].size))
    wide, high = (max(1, round(scale * each)) for each in frames[0].size)
    strip = Image.new("RGB", (len(frames) * (wide + GAP) - GAP, high), "#808080")
    for i, frame in enumerate(frames):
        strip.paste(frame.resize((wide, high), Image.Resampling.LANCZOS), (i * (wide + GAP), 0))
    file = io.BytesIO()
    strip.save(file, "WEBP", quality=QUALITY, method=6)
    return file.getvalue()


def write_played(run: Path, played: Played) -> Path:
    """Write the episodes of a task into the folder of a run, in place of earlier ones of it; returns their folder. Raises
    OutputError."""
    folder = run / FOLDER / played.folder

    def write(draft: Path) -> None:
        known = {name: [_row(each) for each in several] for name, several in played.policies.items()}
        write_json(draft / FILE, {**vars(played), "policies": known})
        for name, several in played.policies.items():
            for i, each in enumerate(several):
                if each.strip is not None:
                    (draft / f"{name}-{i}.webp").write_bytes(each.strip)

    with writing(folder):
        folder.parent.mkdir(exist_ok=True)
    write_folder(folder, write)
    return folder


def _row(each: Seen) -> dict[str, Any]:
    more = {"steps_seen": each.steps, "path": each.path}
    return asdict(each.episode) | {key: value for key, value in more.items() if value}


def folders_of(run: Path) -> list[Path]:
    """The folders of the tasks that were played with a run."""
    return sorted(path.parent for path in (run / FOLDER).glob(f"*/{FILE}"))


def read_played(folder: Path) -> Played:
    """The episodes in a folder of `write_played`. Raises InputError if they cannot be read, or are damaged."""
    tree = read_json(folder / FILE)
    with trusted(folder / FILE, AGAIN):
        rows = {name: tree["policies"].get(name) or [] for name in POLICIES}
        return Played(
            str(tree["environment"]),
            None if tree["task"] is None else int(tree["task"]),
            int(tree["seed"]),
            int(tree["best_of"]),
            tree["iterations"],
            {
                name: [_read(row, folder / f"{name}-{i}.webp") for i, row in enumerate(several)]
                for name, several in rows.items()
                if several
            },
        )


def _read(row: Mapping[str, Any], strip: Path) -> Seen:
    value, discounted = (None if row[key] is None else float(row[key]) for key in ("value", "discounted"))
    path = tuple(tuple(float(place) for place in places) for places in row.get("path", []))
    return Seen(
        Episode(bool(row["success"]), float(row["returned"]), int(row["steps"]), value, discounted, bool(row["over"])),
        strip.read_bytes() if strip.is_file() else None,
        path,
        tuple(int(step) for step in row.get("steps_seen", [])),
    )
