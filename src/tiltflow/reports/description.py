"""A run as plain JSON: its curves with their titles and meanings, the monitor's looks, and what it is; what the page draws."""

# Mutation tests: test_view.py

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from tiltflow.evaluation.metrics import Metric, described
from tiltflow.formatting import Tree, number
from tiltflow.reports.values import capital

AXES = ("step", "seconds", "network_evaluations")
"""Keys of a record that curves can be drawn over."""
MOST_POINTS = 500
"""Points of a curve in a report; in one of more each point is the mean of several steps."""
DIGITS = 5


def describe(
    s: Tree,
    records: Sequence[Tree],
    looks: Sequence[Tree],
    *,
    name: str,
    most_points: int | None = MOST_POINTS,
    after: int = 0,
    keys: Collection[str] | None = None,
) -> dict[str, Any]:
    """Describe a run.

    Args:
        s: its summary; empty before the run is evaluated.
        records: lines of metrics.jsonl.
        looks: lines of monitor.jsonl.
        most_points: most points of a curve; None for all steps.
        after: step up to which curves are left out.
        keys: of the numbers that were not always zero, if `records` are not all.

    Returns a mapping of values that JSON has:

        name: name of the run.
        axes: numbers that curves can be drawn over, by key, one for each point.
        curves: for each metric its title, meaning, what is expected of it, `values` (None where there is none), the standard
            deviations `spread` of the samples behind them, if there are any, and `target`, its value under the target law.
        steps_per_point: number of steps of which a point is the mean.
        looks: for each measure of the monitor its `values`, their standard `errors`, and `target`; None where it was not
            measured. `steps` has the steps of the looks, `alarm` the step of the first alarm and `best` that of the best model.
    """
    metrics = measured(records) if keys is None else [m for key, m in described("training").items() if key in keys]
    records = [row for row in records if row["step"] > after] if after else records
    together = 1 if most_points is None else max(1, math.ceil(len(records) / most_points))
    return {
        "name": name,
        "axes": {axis: ends([number(row, axis) for row in records], together) for axis in AXES},
        "curves": {metric.key: curve(s, metric, records, together) for metric in metrics},
        "steps_per_point": together,
        "looks": looked(s, looks),
    }


def measured(records: Sequence[Tree]) -> list[Metric]:
    """Return the metrics of training that records have and that are not always zero."""
    return [m for key, m in described("training").items() if any(number(record, key) for record in records)]


def curve(s: Tree, metric: Metric, records: Sequence[Tree], together: int) -> dict[str, Any]:
    """Return the curve of a metric."""
    key = metric.key
    spread = [number(row, f"{key}_std") for row in records]
    return {
        "title": metric.title,
        "meaning": metric.meaning,
        "expect": metric.expect,
        "values": means([number(row, key) for row in records], together),
        **({"spread": means(spread, together)} if any(value is not None for value in spread) else {}),
        "target": {"reward": number(s, "reward_target"), "path_kl": number(s, "path_kl_target")}.get(key),
    }


def looked(s: Tree, looks: Sequence[Tree]) -> dict[str, Any]:
    """Return the looks of the monitor, measure by measure."""
    target = (looks[0].get("target") or {}) if looks else {}
    names = dict.fromkeys(name for look in looks for name in look["measures"])
    return {
        "steps": [look["step"] for look in looks],
        "alarm": next((look["step"] for look in looks if look["alarm"]), None),
        "best": number(s, "best_step"),
        "measures": {
            name: {
                "title": capital(name),
                "values": [rounded(look["measures"].get(name, (None, None))[0]) for look in looks],
                "errors": [rounded(look["measures"].get(name, (None, None))[1]) for look in looks],
                "target": rounded(target[name][0]) if name in target else None,
            }
            for name in names
        },
    }


def means(values: Sequence[float | None], together: int) -> list[float | None]:
    """Return the mean of each so many consecutive values, those that are not known left out.

    >>> means([1.0, 3.0, None, 5.0, None, None, 7.0], 2)
    [2.0, 5.0, None, 7.0]
    """
    groups = [
        [value for value in values[i : i + together] if value is not None and math.isfinite(value)]
        for i in range(0, len(values), together)
    ]
    return [rounded(math.fsum(group) / len(group)) if group else None for group in groups]


def ends(values: Sequence[float | None], together: int) -> list[float | None]:
    """Return the last of each so many consecutive values.

    >>> ends([1, 2, 3, 4, 5], 2)
    [2, 4, 5]
    """
    return [values[min(i + together, len(values)) - 1] for i in range(0, len(values), together)]


def rounded(value: float | None) -> float | None:
    """Round a number to as many digits as a curve can show; None for what is not finite, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")
