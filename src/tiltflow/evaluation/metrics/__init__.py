"""Descriptions of metrics, as values: what a number is called, what it means, which way is better.

A family of metrics that are described and computed together is one file here, found by being here: with a tuple `METRICS`, and
a function `measure` that says what an evaluation finds of them, or `nothing` where they are measured elsewhere. The report, the
sweep and the trackers read titles and meanings from these descriptions, and have none of their own.
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
"""Where a number is: in summary.json, in a line of metrics.jsonl, or in a row of the summary's table of sampling points."""
Better = Literal["up", "down", "none"]
"""Which way is better, all else being equal; `none` for what only sets a scale."""
Unit = Literal["", "nats", "share", "seconds", "plain"]
"""How a number is written: `share` in percent, `seconds` as a duration, `plain` with the digits that it has."""


class Section(StrEnum):
    """Question that a metric of the summary helps to answer; a heading of the report."""

    CLOSE = "How close"
    SURE = "How sure"
    VARIED = "How varied"
    COST = "What it cost"


@dataclass(frozen=True)
class Cost:
    """Mark of a distance that a sweep can draw the reward against.

    Args:
        at_base: name, in a row of sweep.json, of the value where nothing differs from the base; empty if that is zero.
        meaning: that value in words.
    """

    at_base: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Metric:
    """Description of a number.

    Args:
        key: its name in the source; dotted for a number in a nested mapping.
        title: a name that needs no context.
        meaning: a sentence. `{dotted.key}` in it stands for that value of the summary, `{group}` for the judge's group.
        expect: of a training curve, what a healthy one looks like.
        short: a name for use beside other metrics, if the title is long.
        section: of a metric of the summary, the part of the report that shows it.
        compared: a sweep compares its points by this number.
        cost: a sweep can take this number for what reward costs.
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
        """The name for a table, where its neighbours give context."""
        return self.short or self.title

    @property
    def swept(self) -> str:
        """The name in a row of sweep.json; of a metric of sampling points, that of the tuned model."""
        return f"{self.key}_tuned" if self.source == "table" else self.key.removeprefix("judge.").replace(".", "_")

    @property
    def axis(self) -> str:
        """The name for an axis, with the unit."""
        return f"{self.title}, in nats" if self.unit == "nats" else self.title


@dataclass(frozen=True)
class Found:
    """What an evaluation finds: entries of the summary, and tests against the target law."""

    entries: Mapping[str, Any] = field(default_factory=dict)
    tests: tuple[Row, ...] = ()


class Measure(Protocol):
    """`measure` of a family of metrics."""

    def __call__(self, seen: Seen, /) -> Found: ...


def nothing(seen: Seen) -> Found:
    """The `measure` of metrics that are no numbers of the samples of an evaluation."""
    return Found()


ORDER = (
    "samples",
    "judge",
    "reward",
    "distance-to-target",
    "balance",
    "distance-to-reference",
    "distance-to-base",
    "path-kl",
    "diversity",
    "cost",
    "training",
)
"""Order of the families on a page, and of the costs among which a sweep takes the first; others follow by name."""


def families() -> list[str]:
    """The names of the families, in order."""
    return sorted(names("evaluation.metrics"), key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


@cache
def every_metric() -> tuple[Metric, ...]:
    """All descriptions, family by family."""
    return tuple(metric for name in families() for metric in member("evaluation.metrics", name, "METRICS"))


def measure(seen: Seen) -> Found:
    """What all families find."""
    entries, tests = dict[str, Any](), list[Row]()
    for name in families():
        function: Measure = member("evaluation.metrics", name, "measure")
        found = function(seen)
        entries |= found.entries
        tests += found.tests
    return Found(entries, tuple(tests))


def described(source: Source) -> dict[str, Metric]:
    """The metrics of a source by their keys, family by family."""
    return {metric.key: metric for metric in every_metric() if metric.source == source}
