"""Metrics, one family a file: their descriptions (title, meaning, which way is better) and their computation.

A file has a tuple `METRICS`, and a function `measure` that computes their values from an evaluation's samples, or `nothing` if
they are computed elsewhere. The report, the sweep and the trackers read titles and meanings from the descriptions, and have
none of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, Literal, Protocol

from tiltflow.evaluation.samples import Seen
from tiltflow.evaluation.verdict import Row
from tiltflow.plugins import member, names

Source = Literal["summary", "training", "table"]
"""Place of a number: summary.json, a line of metrics.jsonl, or a row of the summary's table of sampling points."""
Better = Literal["up", "down", "none"]
"""Direction that is better, all else being equal; `none` for a reference value."""
Unit = Literal["", "nats", "share", "seconds", "bytes", "plain"]
"""Format of a number: `share` in percent, `seconds` as a duration, `bytes` in MB or GB, `plain` with all its digits."""


class Section(StrEnum):
    """Heading of the report for metrics of the summary."""

    CLOSE = "Distance to the target law"
    SURE = "Precision and confidence"
    VARIED = "Diversity"
    MOLECULES = "Molecules"
    COST = "Cost"
    SPEED = "Speed and memory"


@dataclass(frozen=True)
class Cost:
    """Marks a distance that a sweep can plot the reward against.

    Args:
        at_base: name, in a row of sweep.json, of the distance's value for the base itself; empty if that is zero.
        meaning: description of that value.
    """

    at_base: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Metric:
    """Description of a number.

    Args:
        key: name in the source; dotted for a number in a nested mapping.
        title: name that needs no context.
        meaning: a sentence. `{dotted.key}` is replaced by that value of the summary, `{group}` by the judge's group.
        better: direction that is better.
        unit: format of the number.
        expect: description of a healthy training curve.
        short: name for a table, if the title is long.
        source: place of the number.
        section: heading of the report for a metric of the summary.
        compared: whether a sweep compares its points by this number.
        cost: set for a distance that a sweep can plot the reward against.
    """

    key: str
    title: str
    meaning: str = ""
    better: Better = "none"
    unit: Unit = ""
    expect: str = ""
    short: str = ""
    source: Source = "summary"
    section: Section | None = None
    compared: bool = False
    cost: Cost | None = None

    @property
    def head(self) -> str:
        """Name for a table."""
        return self.short or self.title

    @property
    def swept(self) -> str:
        """Name in a row of sweep.json; for a metric of sampling points, that of the tuned model's value."""
        return f"{self.key}_tuned" if self.source == "table" else self.key.removeprefix("judge.").replace(".", "_")

    @property
    def axis(self) -> str:
        """Label of an axis, with the unit."""
        return f"{self.title}, in nats" if self.unit == "nats" else self.title


@dataclass(frozen=True)
class Found:
    """Values of an evaluation: entries of the summary, and tests against the target law."""

    entries: Mapping[str, Any] = field(default_factory=dict)
    tests: tuple[Row, ...] = ()


class Measure(Protocol):
    """Type of `measure` of a family of metrics."""

    def __call__(self, seen: Seen, /) -> Found: ...


def nothing(seen: Seen) -> Found:
    """Return nothing: `measure` of metrics that are computed elsewhere."""
    return Found()


ORDER = (
    "samples",
    "judge",
    "molecules",
    "reward",
    "distance-to-target",
    "achieved-tilt",
    "balance",
    "distance-to-reference",
    "distance-to-base",
    "path-kl",
    "diversity",
    "cost",
    "training",
)
"""Order of the families on the report, and of the costs, of which a sweep takes the first; other families follow by name."""


def families() -> list[str]:
    """Return the names of the families, in order."""
    return sorted(names("evaluation.metrics"), key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


@cache
def every_metric() -> tuple[Metric, ...]:
    """Return all metrics, family by family."""
    return tuple(metric for name in families() for metric in member("evaluation.metrics", name, "METRICS"))


def measure(seen: Seen) -> Found:
    """Compute the metrics of all families."""
    entries, tests = dict[str, Any](), list[Row]()
    for name in families():
        function: Measure = member("evaluation.metrics", name, "measure")
        found = function(seen)
        entries |= found.entries
        tests += found.tests
    return Found(entries, tuple(tests))


def described(source: Source) -> dict[str, Metric]:
    """Return the metrics of a source by key, family by family."""
    return {metric.key: metric for metric in every_metric() if metric.source == source}
