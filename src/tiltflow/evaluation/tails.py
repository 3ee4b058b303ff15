"""Means of tails of samples with weights, and the number that bounds the tail."""

# Mutation tests: test_utility_estimation.py

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.errors import InputError

ROUNDING = 1e-9


def best_share(values: Tensor, p: Tensor, share: float) -> tuple[float, float]:
    """The mean of the best share of values [n] with probabilities p [n], and the threshold above which they lie.

    With equal weights and m = share n, k = floor(m): (sum of the k largest + (m - k) times the next) / m, and the next. Raises
    InputError if the share is less than its first sample: then no sample is above the threshold.
    """
    order = values.argsort(descending=True)
    r, ends = values[order], p[order].cumsum(0)
    if ends[0] > share * (1 + ROUNDING):
        needed = "more samples, or a larger share"
        raise InputError(f"the tail with share {share:g} of {len(values)} samples has less than one of them: take {needed}")
    taken = torch.diff(ends.clamp(max=share), prepend=ends.new_zeros(1))
    after = int(torch.searchsorted(ends, share * (1 + ROUNDING), right=True))
    return float(taken @ r) / float(taken.sum()), float(r[min(after, len(r) - 1)])


def worst_share(values: Tensor, p: Tensor, share: float) -> tuple[float, float]:
    """The mean of the worst share, and the threshold below which they lie."""
    mean, threshold = best_share(-values, p, share)
    return -mean, -threshold
