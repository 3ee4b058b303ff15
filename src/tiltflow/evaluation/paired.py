"""Paired comparisons over seeds: differences of methods that were run with the same seeds, their intervals and p-values.

Where two methods are run with the same seeds, the same noise enters both, so the differences seed by seed tell more than the
two means. They are taken for independent and normal: Student's t with n - 1 degrees of freedom. Of many pairs, p-values are
adjusted by Holm (1979), whatever depends on what; as the family is of all pairs, that also holds for the pairs with the best,
which is known only once all have been measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Coverage of an interval, for one pair alone."""


@dataclass(frozen=True)
class Difference:
    """The mean difference of two methods over seeds.

    Args:
        mean: of the first less the second.
        low, high: the 95 % interval of this pair alone; None for a single seed.
        p: two-sided p-value, for this pair alone; None for a single seed.
        n: number of seeds that both have.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    n: int


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The paired difference of two methods, whose values [n] are of the same seeds in the same order.

    >>> difference([1.0, 2.0, 3.0], [0.0, 2.0, 1.0])
    Difference(mean=1.0, low=-1.484..., high=3.484..., p=0.225..., n=3)

    Raises ValueError for values of another number, or none.
    """
    gaps = [one - other for one, other in zip(first, second, strict=True)]
    n, mean = len(gaps), float(np.mean(gaps)) if gaps else math.nan
    if not n:
        raise ValueError("a difference needs a seed that both have")
    if n == 1:
        return Difference(mean, None, None, None, n)
    error = float(np.std(gaps, ddof=1)) / math.sqrt(n)
    half = error * float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, n)
    return Difference(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of any false rejection among them is at most the level (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, which in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[which]))
        adjusted[which] = largest
    return adjusted


def all_pairs(values: Mapping[str, Mapping[int, float]]) -> dict[tuple[str, str], tuple[Difference, float | None]]:
    """The differences of all pairs that have a seed in common, each with its p-value after Holm's adjustment over the pairs
    that have one.

    Args:
        values: of each method, by seed.
    """
    found = {}
    for one, other in combinations(values, 2):
        if both := sorted(values[one].keys() & values[other].keys()):
            found[one, other] = difference(*([values[name][seed] for seed in both] for name in (one, other)))
    known = [pair for pair, each in found.items() if each.p is not None]
    adjusted = dict(zip(known, holm([found[pair].p or 0.0 for pair in known]), strict=True))
    return {pair: (each, adjusted.get(pair)) for pair, each in found.items()}
