"""Episodes of a run in its report: how often base and tuned policy succeed, what the critics said, and what was seen."""

# Mutation tests: test_played.py

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from tiltflow.errors import InputError
from tiltflow.evaluation.episodes import summary_of
from tiltflow.evaluation.played import AGAIN, FILE, Played, Seen, folders_of, read_played
from tiltflow.files import trusted
from tiltflow.formatting import Tree, decimal, number, percent
from tiltflow.reports import plots
from tiltflow.reports.plots import COLOURS
from tiltflow.reports.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADS = ("Task", "Policy", "Success", "95 %", "Return", "Steps")
OF_VALUES = ("Value", "Discounted", "Difference")
COMPARED = 2
"""Policies that are compared."""


@dataclass(frozen=True)
class Shot:
    """What was seen of an episode of a policy: frames side by side, a .webp in base64; none where its path is drawn."""

    policy: str
    words: str
    strip: str = ""
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class Scene:
    """An episode of all policies, from the same beginning; `paths` (SVG) where there are no frames."""

    title: str
    shots: Sequence[Shot]
    paths: str = ""


@dataclass(frozen=True)
class Task:
    """The episodes of a task.

    Args:
        rows: of the table of all tasks.
        success: share of each policy, and the interval of the last one's, as text.
        notes: what a reader should know of them.
        values: those that the critics gave beside the returns (SVG); empty without critics.
        words: of the command that plays them again, after the folder of the run.
        trouble: why nothing of it can be shown.
    """

    title: str
    rows: Sequence[Sequence[str]] = ()
    success: Sequence[str] = ()
    notes: Sequence[str] = ()
    values: str = ""
    scenes: Sequence[Scene] = ()
    words: Sequence[str] = ()
    trouble: str = ""


def tasks_of(run: Path, s: Tree) -> list[Task]:
    """What was played with a run, one task after another.

    Args:
        s: its summary.
    """
    found = []
    for folder in folders_of(run):
        try:
            with trusted(folder / FILE, AGAIN):
                found.append(task_of(read_played(folder), number(s, "iterations")))
        except InputError as error:
            found.append(Task(folder.name, trouble=str(error)))
    return found


def task_of(played: Played, iterations: float | None) -> Task:
    """What is said of the episodes of a task.

    Args:
        iterations: those of the policy as it is now, if they are known.
    """
    found = {name: summary_of([each.episode for each in several]) for name, several in played.policies.items()}
    *_, last = found.values()
    of_task = [] if played.task is None else ["--task", str(played.task)]
    return Task(
        played.title,
        [row_of(played, name, each) for name, each in found.items()],
        [*(percent(each["success_rate"]) for each in found.values()), interval(last)],
        notes_of(played, iterations),
        values_of(played.policies.get("tuned", ())),
        [scene_of(i, played) for i in range(max(map(filmed, played.policies.values())))],
        ["--environment", played.environment, *of_task],
    )


def row_of(played: Played, name: str, found: Tree) -> list[str]:
    """The row of a policy in the table."""
    policy = f"best of {played.best_of}, {name}" if name == "tuned" and played.best_of > 1 else name
    share = f"{percent(found['success_rate'])}, {found['successes']} of {found['episodes']}"
    values = [("value", ""), ("discounted_return", ""), ("value_error", "value_error_error")]
    return [
        played.title,
        policy,
        share,
        interval(found),
        decimal(found["return"], found["return_error"]),
        decimal(found["steps"]),
        *("–" if (x := number(found, key)) is None else decimal(x, number(found, error)) for key, error in values),
    ]


def interval(found: Tree) -> str:
    """The interval of a success rate, as text."""
    low, high = found["success_rate_interval"]
    return f"{percent(low)} to {percent(high)}"


def table_of(tasks: Sequence[Task]) -> Table | None:
    """The table of all tasks; without values where no critics gave any."""
    rows = [row for task in tasks for row in task.rows]
    if not rows:
        return None
    count = len(HEADS) + len(OF_VALUES) * any(cell != "–" for row in rows for cell in row[len(HEADS) :])
    return Table([*HEADS, *OF_VALUES][:count], [row[:count] for row in rows])


def notes_of(played: Played, iterations: float | None) -> list[str]:
    """How the policies differ where both began alike, and whether they are those of now."""
    notes = []
    if len(played.policies) == COMPARED:
        pairs = list(zip(*([each.episode.success for each in several] for several in played.policies.values()), strict=True))
        only = [sum(pair == wanted for pair in pairs) for wanted in ((False, True), (True, False))]
        notes.append(
            f"Of {len(pairs)} beginnings the tuned policy solved {only[0]} that the base did not, and the base {only[1]} that"
            " the tuned one did not."
        )
    if played.iterations is not None and iterations is not None and played.iterations != iterations:
        notes.append(
            f"They were played after {played.iterations} iterations, and the policy has {iterations:.0f} now: {AGAIN} plays"
            " them again."
        )
    return notes


# ---- what was seen ----


def filmed(several: Sequence[Seen]) -> int:
    """How many of the first episodes were seen."""
    return sum(each.strip is not None or bool(each.path) for each in several)


def scene_of(place: int, played: Played) -> Scene:
    """An episode of all policies."""
    some = {name: several[place] for name, several in played.policies.items() if place < len(several)}
    shots = [shot_of(name, each) for name, each in some.items()]
    paths = paths_of(some) if any(each.path for each in some.values()) else ""
    return Scene(f"Episode {place + 1}", shots, paths)


def shot_of(policy: str, each: Seen) -> Shot:
    """What was seen of an episode, in words and as a strip."""
    episode = each.episode
    words = f"{'success' if episode.success else 'no success'}, return {decimal(episode.returned)}, {episode.steps} steps"
    if episode.value is not None and episode.discounted is not None:
        words += f"; value {decimal(episode.value)}, discounted return {decimal(episode.discounted)}"
    if each.strip is None:
        return Shot(policy, words)
    with Image.open(io.BytesIO(each.strip)) as picture:
        width, height = picture.size
    return Shot(policy, words, base64.b64encode(each.strip).decode(), width, height)


def paths_of(some: dict[str, Seen]) -> str:
    """Draw where each policy went, from a dot to its end: a disc where it succeeded, a cross where not. Of one number it is
    drawn over the steps."""
    with plots.figure_of(3.4, 2.5, layout=plots.LAYOUT) as figure:
        axes = figure.subplots()
        for name, each in some.items():
            path = [(*([step] if len(place) == 1 else []), *place) for step, place in zip(each.steps, each.path, strict=True)]
            across, up = zip(*[place for place in path if all(map(math.isfinite, place))], strict=True)
            axes.plot(across, up, color=COLOURS[name], linewidth=1.6, alpha=0.85)
            axes.plot(across[0], up[0], marker="o", markersize=4, color=COLOURS["ink"])
            mark = "o" if each.episode.success else "x"
            axes.plot(across[-1], up[-1], marker=mark, markersize=8, markeredgewidth=2, color=COLOURS[name])
        one = all(len(place) == 1 for each in some.values() for place in each.path)
        axes.set(xlabel="step" if one else "observation 1", ylabel="observation 1" if one else "observation 2")
        return finished(figure, axes)


def values_of(several: Sequence[Seen]) -> str:
    """Draw the value at the start of each episode and its discounted return: filled where the task was over, and the return is
    known; hollow where the time was. Dashed: they are equal."""
    some = [each.episode for each in several if each.episode.value is not None and each.episode.discounted is not None]
    known = [(each.value, each.discounted, each.over) for each in some]
    points = [(x, y, over) for x, y, over in known if x is not None and y is not None and math.isfinite(x + y)]
    if not points:
        return ""
    with plots.figure_of(4.6, 3.2, layout=plots.LAYOUT) as figure:
        axes = figure.subplots()
        ends = [min(min(x, y) for x, y, _ in points), max(max(x, y) for x, y, _ in points)]
        axes.plot(ends, ends, color=COLOURS["target"], linewidth=1.4, linestyle=(0, (4, 3)))
        for over in (False, True):
            across, up = ([point[i] for point in points if point[2] == over] for i in (0, 1))
            face = COLOURS["tuned"] if over else "none"
            axes.plot(across, up, "o", color=COLOURS["tuned"], markerfacecolor=face, markersize=5, alpha=0.8)
        axes.set(xlabel="value at the start, by the critics", ylabel="discounted return")
        return finished(figure, axes)


def finished(figure: Figure, axes: Axes) -> str:
    """A plot as SVG, with what all of them have."""
    for axis in (axes.xaxis, axes.yaxis):
        plots.ticks(axis, 5)
    axes.grid(color=COLOURS["line"], linewidth=0.8)
    axes.tick_params(length=0)
    axes.margins(0.08)
    return plots.as_svg(figure)
