"""A sweep for a reader: a sortable table of its points, and the front of reward against its cost."""

# Mutation tests: none: words and pages

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tiltflow.evaluation.metrics import Metric, every_metric
from tiltflow.formatting import decimal, percent
from tiltflow.reports.plots import pareto
from tiltflow.reports.tables import Cell
from tiltflow.reports.values import filled, small

Row = Mapping[str, Any]


def swept(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the template of a sweep says of the content of sweep.json."""
    points: Sequence[Row] = content["points"]
    finished = [row for row in points if "error" not in row]
    settings, metrics = settings_of(points[0]) if points else [], {metric.swept: metric for metric in every_metric()}
    keys = [key for key in dict.fromkeys(key for row in finished for key in row) if f"{key}_error" in dict(finished[0])]
    heads = [head_of(key, metrics) for key in keys]
    return {
        "name": name,
        "settings": settings,
        "heads": [*(settings or ["run"]), "runs", "on the front", *heads],
        "rows": [row_of(row, settings, keys, metrics) for row in points],
        "failed": [(", ".join(f"{key} = {row[key]}" for key in settings), row["error"]) for row in points if "error" in row],
        "svg": pareto(points, settings, metrics[content["distance"]]) if finished else "",
        "seeds": max((row["runs"] for row in points), default=0),
        "number": len(points),
        "finished": len(finished),
    }


def head_of(key: str, metrics: Mapping[str, Metric]) -> str:
    """The head of a column of numbers; those of the first sampling point are of two models."""
    metric = metrics.get(key)
    if metric is not None:
        return small(filled(metric.head, {}))
    of_base = metrics.get(f"{key.removesuffix('_base')}_tuned")
    return f"{small(filled(of_base.head, {}))}, base" if of_base is not None else key.replace("_", " ")


def settings_of(point: Row) -> list[str]:
    """The settings in which points differ: what comes before the number of runs."""
    keys = list(point)
    return keys[: keys.index("runs")]


def row_of(row: Row, settings: Sequence[str], keys: Sequence[str], metrics: Mapping[str, Metric]) -> list[Cell]:
    """The row of a point."""
    front = bool(row.get("on_front"))
    values = [Cell(str(row[key]), row[key] if isinstance(row[key], int | float) else None) for key in settings]
    measured = [cell(row, key, metrics.get(key)) for key in keys]
    return [*(values or [Cell("base settings")]), Cell(str(row["runs"]), row["runs"]), Cell("yes" if front else "–"), *measured]


def cell(row: Row, key: str, metric: Metric | None) -> Cell:
    """A mean over seeds, with its standard error."""
    value, error = row.get(key), row.get(f"{key}_error")
    if not isinstance(value, int | float):
        return Cell("–")
    form = percent if metric is not None and metric.unit == "share" else decimal
    return Cell(form(value, error), value)
