"""What the rows of a comparison say: the candidate that tuning chooses, means over seeds, and differences to the best."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tiltflow.evaluation.paired import all_pairs
from tiltflow.runs.comparison.budget import KINDS
from tiltflow.runs.comparison.plan import FACTORS, SHARE_OF_TUNING, Plan
from tiltflow.runs.comparison.subject import Subject
from tiltflow.runs.comparison.training import SHARES
from tiltflow.runs.sweep import beats, standard_error

Row = Mapping[str, Any]
BETTER = {"reward": "up", "distance": "down", "diversity": "up"}
"""What methods are compared by, and which way is better."""
MEASURED = ("reward", "distance", "floor", "achieved_tilt", "path_kl", "diversity", *KINDS)
"""Columns of the table."""
REFERENCES = ("reward_base", "reward_target", "distance_base", "diversity_base", "diversity_target")
NEAR = 0.5
"""The part of the base's distance to the target law that a method may have left to be called the best in reward or diversity:
one that ran away from every law has more of both than any that found its own."""


def last_of(row: Row) -> Row | None:
    """The last measurement of a training; None if it stopped."""
    return row["points"][-1] if row["stopped"] is None and row["points"] else None


def best_factor(rows: Sequence[Row], subject: str, method: str) -> float:
    """The factor on the learning rate that tuning chooses: that of the smallest distance to the target law, where that is known
    of all candidates, else of the largest reward. 1 where nothing was tuned, or all candidates stopped; the earlier of
    `FACTORS` where two are equal."""
    known = {row["factor"]: last for row in tunings_of(rows, subject, method) if (last := last_of(row)) is not None}
    candidates = [factor for factor in FACTORS if factor in known]
    if not candidates:
        return 1.0
    if all(known[factor]["distance"] is not None for factor in candidates):
        return min(candidates, key=lambda factor: float(known[factor]["distance"]))
    return max(candidates, key=lambda factor: float(known[factor]["reward"]))


def tunings_of(rows: Sequence[Row], subject: str, method: str) -> list[Row]:
    """The trainings of the candidates."""
    return [row for row in rows if (row["purpose"], row["subject"], row["method"]) == ("tuning", subject, method)]


def results(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """The content of comparison.json: of each subject its methods, the best of them by `BETTER`, and the differences."""
    return {
        **plan.as_tree(),
        "share_of_tuning": SHARE_OF_TUNING,
        "near": NEAR,
        "results": [of_subject(plan, rows, each) for each in plan.subjects],
    }


def of_subject(plan: Plan, rows: Sequence[Row], posed: Subject) -> dict[str, Any]:
    """The results of a subject."""
    subject = posed.name
    runs = {
        method: {
            row["seed"]: row for row in rows if (row["purpose"], row["subject"], row["method"]) == ("run", subject, method)
        }
        for method in plan.methods
    }
    finals = {
        method: {seed: last for seed, row in sorted(each.items()) if (last := last_of(row))} for method, each in runs.items()
    }
    measured = [last for each in finals.values() for last in each.values()]
    references = {key: mean_of([last[key] for last in measured if last.get(key) is not None]) for key in REFERENCES}
    base = references["distance_base"]["mean"]
    others = list(dict.fromkeys(name for last in measured for name in last.get("held_out", ())))
    methods = [of_method(rows, subject, method, runs[method], others) for method in plan.methods]
    methods = [method | {"near": near(method, base)} for method in methods]
    return {
        "subject": subject,
        "beta": posed.beta,
        "law": posed.law,
        "black_box": posed.black_box,
        "references": references,
        "held_out_base": held_out(measured, "held_out_base", others),
        "methods": marked(methods),
        "differences": {key: differences(finals, methods, key) for key in BETTER},
    }


def of_method(rows: Sequence[Row], subject: str, method: str, runs: Mapping[int, Row], others: Sequence[str]) -> dict[str, Any]:
    """The results of a method on a subject.

    Args:
        others: rewards that were held out.
    """
    tuned, finals = tunings_of(rows, subject, method), [last for row in runs.values() if (last := last_of(row))]
    cost = next(row for row in rows if (row["purpose"], row["subject"], row["method"]) == ("cost", subject, method))
    return {
        "method": method,
        "aims_at": cost["aims_at"],
        "n": len(finals),
        "stopped": [f"seed {seed}: {row['stopped']}" for seed, row in sorted(runs.items()) if row["stopped"] is not None],
        "learning_rate": next((row["learning_rate"] for row in runs.values()), None),
        "factor": best_factor(rows, subject, method),
        "steps": mean_of([row["steps"] for row in runs.values()])["mean"],
        **{key: mean_of([last.get(key) for last in finals]) for key in MEASURED},
        "held_out": held_out(finals, "held_out", others),
        "points": [over_seeds(list(runs.values()), share) for share in (*SHARES, 1.0)],
        "tuning": {
            "candidates": [candidate(row) for row in sorted(tuned, key=lambda row: float(row["factor"]))],
            **{kind: sum(row[kind] for row in tuned) for kind in KINDS},
        },
    }


def held_out(points: Sequence[Row], key: str, names: Sequence[str]) -> dict[str, Any]:
    """The means of rewards that are measured and not trained on, by name; None where no training came to its end.

    >>> held_out([{"own": {"validity": 1.0}}, {"own": {"validity": 0.5}}], "own", ["validity"])["validity"]["mean"]
    0.75
    >>> held_out([], "own", ["validity"])["validity"]["mean"] is None
    True
    """
    return {name: mean_of([point.get(key, {}).get(name) for point in points]) for name in names}


def near(method: Row, distance_base: float | None) -> bool | None:
    """Whether a method ends near the target law: no seed stopped, and no more than `NEAR` of the base's distance is left. None
    where the distance is not known.

    >>> near({"stopped": [], "distance": {"mean": 0.1}}, 0.4), near({"stopped": [], "distance": {"mean": 0.3}}, 0.4)
    (True, False)
    >>> unknown = {"mean": None}
    >>> near({"stopped": [], "distance": unknown}, None), near({"stopped": ["seed 1: x"], "distance": unknown}, 0.4)
    (None, False)
    """
    if method["stopped"]:
        return False
    left = method["distance"]["mean"]
    return None if left is None or distance_base is None else bool(left <= NEAR * distance_base)


def candidate(row: Row) -> dict[str, Any]:
    """A candidate of tuning, and what it was chosen by."""
    last = last_of(row) or {}
    head = {key: row[key] for key in ("factor", "learning_rate", "stopped")}
    return head | {key: last.get(key) for key in ("reward", "distance")}


def over_seeds(runs: Sequence[Row], share: float) -> dict[str, Any]:
    """The means at a share of the budget, of the trainings that were measured there."""
    points = [point for row in runs for point in row["points"] if point["share"] == share]
    return {"share": share} | {key: mean_of([point.get(key) for point in points]) for key in (*BETTER, *KINDS)}


def mean_of(values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, standard error and number of values; None where one is unknown, or there is none.

    >>> mean_of([1.0, 3.0]), mean_of([1.0, None])["mean"]
    ({'mean': 2.0, 'error': 1.0, 'n': 2}, None)
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "error": None, "n": len(known)}
    return {"mean": statistics.mean(known), "error": standard_error(known), "n": len(known)}


def marked(methods: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The methods, each with the fronts that it is on: it is near the target law, as far as that is known, and no other of
    these has at least its reward at no larger distance, or at no smaller diversity, and is better in one of both."""
    allowed = [m for m in methods if m["near"] is not False and m["reward"]["mean"] is not None]
    for cost, sign in (("distance", 1), ("diversity", -1)):
        known = [m for m in allowed if m[cost]["mean"] is not None]
        places = [{"reward_tuned": m["reward"]["mean"], "cost": sign * m[cost]["mean"]} for m in known]
        for method in methods:
            method[f"on_front_of_{cost}"] = False
        for method, place in zip(known, places, strict=True):
            method[f"on_front_of_{cost}"] = not any(beats(other, place, "cost") for other in places)
    return methods


def differences(finals: Mapping[str, Mapping[int, Row]], methods: Sequence[Row], key: str) -> dict[str, Any] | None:
    """The best method by a key, of those near the target law, and how far all others are from it: paired over seeds. None where
    it is not known of two, or none is near."""
    known = [m["method"] for m in methods if m[key]["mean"] is not None]
    allowed = [m["method"] for m in methods if m["method"] in known and (key == "distance" or m["near"] is not False)]
    if len(known) < 2 or not allowed:
        return None
    choose = max if BETTER[key] == "up" else min
    means = {m["method"]: m[key]["mean"] for m in methods}
    best = choose(allowed, key=means.__getitem__)
    found = all_pairs({name: {seed: last[key] for seed, last in finals[name].items()} for name in known})
    rows = []
    for (one, other), (each, adjusted) in found.items():
        if best in (one, other):
            sign, name = (-1, other) if one == best else (1, one)
            low, high = (None if end is None else sign * end for end in (each.low, each.high)[::sign])
            rows.append({"method": name, "mean": sign * each.mean, "low": low, "high": high, "p": adjusted, "n": each.n})
    return {"best": best, "pairs": len(found), "others": sorted(rows, key=lambda row: abs(row["mean"]))}
