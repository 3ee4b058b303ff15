"""Several runs on a page: a row for each in a table, their curves in one place, and their pictures."""

# Mutation tests: none: words and pages

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiltflow.evaluation.metrics import described
from tiltflow.formatting import Tree, duration, number
from tiltflow.reports.page import Card, last
from tiltflow.reports.plots import SERIES
from tiltflow.reports.tables import Cell
from tiltflow.reports.values import filled, shown, small

COLUMNS = ("reward_base", "reward_tuned", "target_distance", "target_distance_floor", "achieved_tilt", "path_kl")
"""Numbers of the summary that the table has."""
PICTURES = 24
"""Runs of which pictures are shown, at most."""


@dataclass(frozen=True)
class Shown:
    """A run among others.

    Args:
        key, href: its key, and the address of its page.
        state: whether it is being trained, finished, ..
        drawn: what `describe` says of it.
        picture: its after.png, if there is one.
    """

    name: str
    key: str
    href: str
    state: str
    summary: Tree
    drawn: Mapping[str, Any]
    picture: bytes | None


def overview(runs: Sequence[Shown]) -> dict[str, Any]:
    """What the template of several runs says."""
    metrics = described("summary")
    drawn = [run.drawn for run in runs]
    return {
        "heads": ["run", "state", "method", *(small(filled(metrics[key].head, {})) for key in COLUMNS), "iterations", "time"],
        "rows": [row(i, run) for i, run in enumerate(runs)],
        "curves": cards([each["curves"] for each in drawn]),
        "looks": cards([each["looks"]["measures"] for each in drawn if len(each["looks"]["steps"]) > 1]),
        "pictures": [
            (run.name, run.href, base64.b64encode(run.picture).decode("ascii")) for run in runs[:PICTURES] if run.picture
        ],
    }


def row(place: int, run: Shown) -> list[Cell]:
    """The row of a run."""
    units = {key: metric.unit for key, metric in described("summary").items()}
    numbers = [Cell(shown(run.summary, key, units[key]) or "–", number(run.summary, key)) for key in COLUMNS]
    steps, seconds = ([value for value in run.drawn["axes"][axis] if value is not None] for axis in ("step", "seconds"))
    return [
        Cell(run.name, href=run.href, swatch=f"s{place % len(SERIES)}", run=run.key),
        Cell(f"{run.state}, alarm" if run.drawn["looks"]["alarm"] is not None else run.state),
        Cell(str(run.summary.get("method") or "–")),
        *numbers,
        Cell(str(steps[-1]), steps[-1]) if steps else Cell("–"),
        Cell(duration(seconds[-1]), seconds[-1]) if seconds else Cell("–"),
    ]


def cards(several: Sequence[Mapping[str, Any]]) -> list[Card]:
    """A place for each curve that any run has."""
    first = {key: each for curves in reversed(several) for key, each in curves.items()}
    keys = dict.fromkeys(key for curves in several for key in curves)
    return [
        Card(key, first[key]["title"], last(first[key]["values"]), first[key].get("meaning", ""), first[key].get("expect", ""))
        for key in keys
    ]
