"""The verdict on a run's distance to the target law: a test of each statistic, and one sentence.

Each statistic of the tuned samples is tested against its estimate from base samples weighted toward the target law, with the
errors of both. The tests are corrected together (Holm 1979): if the tuned model follows the target law, at most one run in
twenty has a test that rejects. A test that does not reject proves nothing, so each has its smallest detectable deviation. The
sentence says no more than the tests do.
"""

# Mutation tests: test_verdict.py

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from scipy.special import ndtr, ndtri, stdtr
from torch import Tensor

from tiltflow.evaluation.distances import DistanceOverGroups, kolmogorov_smirnov, reward_distance, reward_masses
from tiltflow.evaluation.estimates import Estimate, mean_estimate, one_hot
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.formatting import decimal, percent

LEVEL = 0.05
"""Family-wise error rate: largest chance that any test rejects under the null hypothesis."""
POWER = 0.8
"""Power at which `detectable` is stated."""
FEWEST_OF_CLASS = 20
"""Expected tuned samples, and effective target samples, of a class below which its share is not approximately normal."""

Row = dict[str, Any]
"""A test, as in summary.json: statistic; unit ("share" or ""); base, tuned, target and their errors; z; p; p_base, the p-value
of the base in the same test; p_holm and rejected, after the correction; detectable, the smallest deviation that is detected
with probability POWER; counted, false if training was calibrated on the statistic."""


def mean_test(
    statistic: str,
    tuned: Tensor,
    base: Tensor,
    weights: ImportanceWeights,
    *,
    unit: Literal["", "share"] = "",
    counted: bool = True,
) -> Row:
    """Test whether the mean of `tuned` [n] is that of the target law, estimated from `base` [m] with `weights`.

    For one group, z = (tuned - target) / error, with both errors added in quadrature; the error of a share of tuned samples is
    that of a binomial with the target's share. For strata, the same within each. For other groups, Student's t of the
    differences within the groups, in which effects of a group cancel.

    Args:
        statistic: its name.
        unit: "share" for members, 0 or 1.
        counted: False if training was calibrated on the statistic.
    """
    tuned, base = tuned.double(), base.double()
    here, there, target = _over_groups(tuned, weights), _over_groups(base, weights), Estimate(*map(float, weights.mean(base)))
    ours, theirs = (_difference(values, base, weights, unit == "share") for values in (tuned, base))
    groups = 1 if weights.strata else weights.groups
    return _row(statistic, unit, here, there, target, ours, theirs, groups, counted)


def _difference(values: Tensor, base: Tensor, weights: ImportanceWeights, share: bool) -> Estimate:
    """Return the difference of the mean of values [n] from the target's, with its standard error."""
    target, error = weights.mean(base)
    if weights.groups == 1:
        variance = target * (1 - target) if share else values.var()
        return Estimate((values.mean() - target).item(), math.sqrt(variance / len(values) + error**2))
    if weights.strata:
        shares = weights.group_means(base).clamp(0, 1)
        variance = (shares * (1 - shares)).mean() if share else values.reshape(weights.groups, -1).var(1).mean()
        return Estimate((values.mean() - target).item(), math.sqrt(variance / len(values) + error**2))
    each = values.reshape(weights.groups, -1).mean(1) - weights.group_means(base)
    return Estimate(each.mean().item(), math.sqrt(each.var() / len(each) + weights.bias(base) ** 2 / 9))


def _over_groups(values: Tensor, weights: ImportanceWeights) -> Estimate:
    each = values.reshape(weights.groups, -1)
    if weights.strata:
        return Estimate(values.mean().item(), math.sqrt(each.var(1).mean() / len(values)))
    return mean_estimate(values if weights.groups == 1 else each.mean(1))


def _row(
    statistic: str,
    unit: str,
    tuned: Estimate,
    base: Estimate,
    target: Estimate,
    ours: Estimate,
    theirs: Estimate,
    groups: int,
    counted: bool,
) -> Row:
    def p_value(difference: Estimate) -> float:
        if difference.standard_error == 0:
            return float(difference.value == 0)
        z = abs(difference.value) / difference.standard_error
        return float(2 * (ndtr(-z) if groups == 1 else stdtr(groups - 1, -z)))

    error = ours.standard_error
    return {
        "statistic": statistic,
        "unit": unit,
        "base": base.value,
        **tuned.named("tuned"),
        **target.named("target"),
        "z": ours.value / error if error > 0 else None,
        "p": p_value(ours),
        "p_base": p_value(theirs),
        "error": error,
        "counted": counted,
    }


def distance_test(statistic: str, tuned: float, base: float, null: Tensor) -> Row:
    """Test whether a distance to the target law is larger than under the null hypothesis.

    Args:
        tuned, base: distances of the two models.
        null: distances [draws] under the null hypothesis, from `ImportanceWeights.null_distances`; their mean is the floor,
            which stands as the target.
    """

    def p_value(distance: float) -> float:
        return (1 + int((null >= distance).sum())) / (1 + len(null))

    floor, spread = null.mean().item(), null.std().item()
    return {
        "statistic": statistic,
        "unit": "",
        "base": base,
        "tuned": tuned,
        "tuned_error": None,
        "target": floor,
        "target_error": spread,
        "z": (tuned - floor) / spread if spread > 0 else None,
        "p": p_value(tuned),
        "p_base": p_value(base),
        "null": null.sort().values,
        "counted": True,
    }


def share_test(statistic: str, tuned: Tensor, base: Tensor, weights: ImportanceWeights) -> Row | None:
    """Return the `mean_test` of members, 0 or 1; None if members or non-members are too few for a normal approximation."""
    share, error = map(float, weights.mean(base.double()))
    share = min(max(share, 0.0), 1.0)  # weights sum to one but for rounding
    if error == 0 or min(share * (1 - share) / error**2, len(tuned)) * min(share, 1 - share) < FEWEST_OF_CLASS:
        return None
    return mean_test(statistic, tuned, base, weights, unit="share")


def class_tests(
    labels: Tensor, base_labels: Tensor, weights: ImportanceWeights, names: Sequence[str], group: Collection[int] = ()
) -> list[Row]:
    """Test the share of each class that is common enough, and of all others together.

    Args:
        labels, base_labels: classes [n] of the tuned and [m] of the base samples.
        names: of the classes.
        group: classes whose joint share is tested already: that of all others would be the same test.
    """
    members, base_members = one_hot(labels, len(names)), one_hot(base_labels, len(names))
    rows, rare = [], []
    for i, name in enumerate(names):
        row = share_test(f"share of class {name}", members[:, i], base_members[:, i], weights)
        rows += [] if row is None else [row]
        rare += [i] if row is None else []
    if rare and rows and set(rare) not in (set(group), set(range(len(names))) - set(group)):
        others = f"share of the other classes, {', '.join(names[i] for i in rare)}"
        row = share_test(others, members[:, rare].sum(1), base_members[:, rare].sum(1), weights)
        rows += [] if row is None else [row]
    return rows


def of_rewards(
    tuned: Tensor,
    base: Tensor,
    weights: ImportanceWeights,
    generator: torch.Generator,
    *,
    counted: bool = True,
    group: str = "group",
    draws: int = 1000,
) -> tuple[dict[str, Any], list[Row]]:
    """Compare the rewards of tuned samples [n] with those of weighted base samples [m]: (entries of the summary, tests).

    If the target law is unknown, `target_unknown` says why, and all its numbers are None.

    Args:
        counted: False if training was calibrated on the mean reward, which then does not count as a test.
        group: word for a group of the weights.
        draws: number of simulated distances under the null hypothesis.
    """
    why = weights.unknown(group)
    entries: dict[str, Any] = {"target_unknown": why, "effective_sample_size": weights.effective_sample_size}
    if weights.groups > 1:
        entries["effective_sample_size_of_group"] = weights.effective_group_size
    keys = ("reward_target", "reward_distance", "target_distance", "path_kl_target")
    if why is not None:
        absent = [key + part for key in keys for part in ("", "_error")]
        return entries | dict.fromkeys([*absent, *FLOORS, "target_distance_base", "target_distance_kind"]), []
    if weights.groups > 1 and not weights.strata:
        gaps = DistanceOverGroups.of(tuned, base, weights)
        distance, null = Estimate(gaps.value, gaps.spread(generator)), gaps.null(generator, draws)
        of_base = DistanceOverGroups.of(base, base, weights).value
    else:
        distance = reward_distance(tuned, base, weights, generator)
        of_base = kolmogorov_smirnov(base, base, weights.weights)
        null = weights.null_distances(len(tuned), [reward_masses(base)], generator, draws=draws)[0]
    rows = [
        mean_test("mean reward", tuned, base, weights, counted=counted),
        distance_test("distance in reward", distance.value, of_base, null),
    ]
    entries |= Estimate(*map(float, weights.mean(base.double()))).named("reward_target")
    if weights.groups > 1:
        entries["reward_target_bias"] = weights.bias(base).item()
    where = f" for each {group}" if weights.groups > 1 else ""
    return (
        entries
        | distance.named("reward_distance")
        | distance.named("target_distance")
        | dict.fromkeys(FLOORS, null.mean().item())
        | {
            "target_distance_base": of_base,
            "target_distance_kind": f"Kolmogorov-Smirnov distance of the reward's law to the base's, weighted{where}",
        }
        | weights.divergence().named("path_kl_target"),
        rows,
    )


FLOORS = ("reward_distance_floor", "target_distance_floor")


def corrected(rows: Sequence[Row]) -> list[Row]:
    """Correct the tests for their number: adds `p_holm`, `rejected` and `detectable` to each."""
    counted = sorted((row for row in rows if row["counted"]), key=lambda row: row["p"])
    size, worst, holm = len(counted), 0.0, dict[int, float]()
    for i, row in enumerate(counted):
        worst = max(worst, min(1.0, (size - i) * row["p"]))
        holm[id(row)] = worst
    done = []
    for row in rows:
        kept = {key: value for key, value in row.items() if key not in ("error", "null")}
        p = holm.get(id(row))
        level = LEVEL / max(size, 1)
        if "null" in row:
            seen = torch.quantile(row["null"], 1 - level).item()
        else:
            seen = float(ndtri(1 - level / 2) + ndtri(POWER)) * row["error"]
        done.append(kept | {"p_holm": p, "rejected": p is not None and p <= LEVEL, "detectable": seen})
    return done


def conclude(rows: Sequence[Row], summary: dict[str, Any]) -> dict[str, Any]:
    """Return the entries `tests`, the corrected tests, and `verdict`, a tone ("good", "fair" or "poor") and a text, of a
    summary.

    The best verdict is that the tests do not distinguish the tuned model from the target law.
    """
    tests = corrected(rows)
    tone, text = _in_words(tests, len([row for row in rows if row["counted"]]), summary)
    return {"tests": tests, "verdict": {"tone": tone, "text": text}}


def _in_words(tests: Sequence[Row], size: int, summary: dict[str, Any]) -> tuple[str, str]:
    if (why := summary.get("target_unknown")) is not None:
        return "fair", f"No verdict: the target law is unknown. {why}"
    counted, aside = [row for row in tests if row["counted"]], [row for row in tests if not row["counted"]]
    rejected = sorted((row for row in counted if row["rejected"]), key=lambda row: row["p"])
    base_is_told = any(row["p_base"] * size <= LEVEL for row in counted)
    notes = [
        f"The {row['statistic']} is not counted: training was calibrated on it, so it agrees by construction"
        f"{_z(row, ' (', ')')}."
        for row in aside
    ]
    if rejected:
        said = "; ".join(_told(row) for row in rejected[:3])
        more = f"; and {len(rejected) - 3} more" if len(rejected) > 3 else ""
        verb = "distinguishes" if len(rejected) == 1 else "distinguish"
        text = f"{len(rejected)} of {size} tests {verb} the tuned model from the target law: {said}{more}."
        tone, way = _way(summary)
        return tone, " ".join(filter(None, [text, way, *notes]))
    if not base_is_told:
        whose = "This test distinguishes" if size == 1 else f"These {size} tests distinguish"
        text = f"{whose} neither the tuned nor the base model from the target law: too little power."
        return "fair", " ".join([text, *notes])
    means = [row for row in counted if row["tuned_error"] is not None][:2]
    able = " and ".join(f"a {row['statistic']} that is off by {_deviation(row)}" for row in means)
    seen = f" With {POWER:.0%} power, {'it detects' if size == 1 else 'they detect'} {able}." if able else ""
    whose = "This test does" if size == 1 else f"These {size} tests do"
    return "good", " ".join([f"{whose} not distinguish the tuned model from the target law.{seen}", *notes])


def _told(row: Row) -> str:
    if row["tuned_error"] is None:
        return f"{row['statistic']}: {decimal(row['tuned'])}, where {decimal(row['target'])} is expected under the target law"
    both = (_form(row, row[key], row[f"{key}_error"]) for key in ("tuned", "target"))
    return f"{row['statistic']}: {' against '.join(both)}{_z(row, ' (', ')')}"


def _z(row: Row, before: str, after: str) -> str:
    return "" if row["z"] is None else f"{before}z {row['z']:+.1f}{after}".replace("-", "−")


def _form(row: Row, value: float, error: float | None = None) -> str:
    return percent(value, error) if row["unit"] == "share" else decimal(value, error)


def _deviation(row: Row) -> str:
    return f"{decimal(100 * row['detectable'])} points" if row["unit"] == "share" else decimal(row["detectable"])


def _way(summary: dict[str, Any]) -> tuple[str, str]:
    """Describe the way from the base to the target law, by the distance that the report shows: (tone, sentence)."""
    distance, base, floor = (summary.get(f"target_distance{part}") for part in ("", "_base", "_floor"))
    spread = summary.get("target_distance_error") or 0.0
    if distance is None or base is None or floor is None or base <= floor:
        return "fair", ""
    if distance >= base - 2 * spread:
        return "poor", "It is not measurably closer to the target law than the base model."
    way = min(max((base - distance) / (base - floor), 0.0), 0.99)
    return "fair", f"By the {summary['target_distance_kind']}, it is {way:.0%} of the way from the base to the target law."
