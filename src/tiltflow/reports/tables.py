"""Tables of a report: tests, classes, sampling points, and all metrics. Cells are formatted text."""

# Mutation tests: none: words and pages

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tiltflow.evaluation.metrics import Section, described
from tiltflow.formatting import Tree, decimal, number, percent
from tiltflow.reports.values import COLUMNS, FACTS, capital, filled, measured, shown


@dataclass(frozen=True)
class Table:
    """Heads of columns, and rows of cells."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Cell:
    """A cell of a sortable table: its text, the number to sort by, whether it is the best, the page that it leads to, and the
    run whose curves have the colour `swatch`."""

    text: str
    value: float | None = None
    best: bool = False
    href: str = ""
    swatch: str = ""
    run: str = ""


@dataclass(frozen=True)
class Row:
    """A row of the list of all metrics."""

    title: str
    value: str
    meaning: str


def tests(s: Tree) -> Table | None:
    """Return the tests, one per row: the tuned value, the target's, and whether they differ significantly."""
    known = s.get("tests")
    if not isinstance(known, list) or not known or not all(isinstance(row, Mapping) for row in known):
        return None
    rows = []
    for row in known:
        share = row.get("unit") == "share"
        tuned, target = (shown(row, key, "share" if share else "") or "–" for key in ("tuned", "target"))
        z, p, seen = (number(row, key) for key in ("z", "p_holm", "detectable"))
        rows.append(
            [
                str(row.get("statistic", "")),
                tuned,
                target,
                "–" if z is None else f"{z:+.1f}".replace("-", "−"),
                "–" if p is None else "< 0.001" if p < 1e-3 else decimal(p),
                "–" if seen is None else f"{decimal(100 * seen)} points" if share else decimal(seen),
                "not counted" if not row.get("counted") else "yes" if row.get("rejected") else "not detected",
            ]
        )
    return Table(("Statistic", "Tuned", "Target", "z", "p", "Detectable", "Differs"), rows)


def classes(
    names: Sequence[str],
    base: Sequence[float],
    tuned: Sequence[float],
    target: Sequence[float],
    target_error: Sequence[float] | None,
    count: float | None,
    head: str = "Class",
) -> Table:
    """Return the share of each class; shares of `count` independent samples have binomial standard errors."""

    def shares(values: Sequence[float], errors: Sequence[float] | None) -> list[str]:
        return [percent(value, errors[i] if errors else None) for i, value in enumerate(values)]

    of_samples = [[math.sqrt(p * (1 - p) / count) for p in values] if count else None for values in (base, tuned)]
    known = shares(target, target_error) or ["–"] * len(names)
    rows = zip(names, shares(base, of_samples[0]), shares(tuned, of_samples[1]), known, strict=True)
    return Table((head, "Base", "Tuned", "Target"), list(rows))


def table(s: Tree) -> Table | None:
    """Return the table of sampling points, one per row."""
    rows = s.get("table")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return None
    heads = COLUMNS | {key: metric.head for key, metric in described("table").items()}
    columns = [key for key in rows[0] if not key.endswith("_error")]
    return Table([heads.get(key, key) for key in columns], [[shown(row, key) or "–" for key in columns] for row in rows])


def measures(s: Tree) -> dict[str, list[Row]]:
    """Return all numbers of the summary, by heading."""
    known = described("summary")
    found: dict[str, list[Row]] = {section: [] for section in Section}
    for key, metric in known.items():
        if metric.section is not None and (value := shown(s, key, metric.unit)):
            found[metric.section].append(Row(filled(metric.head, s), value, filled(metric.meaning, s)))
    found["Run"] = [
        Row(filled(fact.title, s), value, filled(fact.meaning, s))
        for key, fact in FACTS.items()
        if (value := shown(s, key, fact.unit))
    ]
    rest = [key for key in s if key.removesuffix("_error") not in {*known, *FACTS, "alarm_step", "best_step"}]
    found["Other"] = [Row(capital(key.replace("_", " ")), shown(s, key), "") for key in rest if measured(s, key)]
    return {heading: rows for heading, rows in found.items() if rows}
