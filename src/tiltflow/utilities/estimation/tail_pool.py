"""Pools of samples in which a tail is well represented: all strata, each with the weight that it has among all samples.

A gradient that only the best hundredth of samples has is lost in a batch. From many cheap samples some of the tail and some of
the body are kept, each with the weight N_h / (N n_h) for n_h of the N_h in its stratum: a weighted mean over the pool is
unbiased for the mean over all N.
"""

# Mutation tests: test_utility_estimation.py

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.errors import InputError


@dataclass(frozen=True)
class Pool:
    """What is kept.

    Args:
        which: indices [kept] among all samples.
        weights: [kept], float64; they sum to 1.
    """

    which: Tensor
    weights: Tensor


def strata(inside: Tensor, *, tail: int, body: int, generator: torch.Generator) -> Pool:
    """Keep up to so many of the samples that are `inside` the tail, [n] of booleans, and of the others, drawn without
    replacement."""
    which, weights = [], []
    for stratum, most in ((inside, tail), (~inside, body)):
        members = stratum.nonzero()[:, 0].cpu()
        order = torch.randperm(len(members), generator=generator, device=generator.device).cpu()
        kept = members[order[:most]]
        which.append(kept)
        weights.append(torch.full((len(kept),), len(members) / (len(inside) * max(len(kept), 1)), dtype=torch.float64))
    return Pool(torch.cat(which).to(inside.device), torch.cat(weights).to(inside.device))


def tail_pool(
    rewards: Tensor, threshold: float, *, tail: int, body: int, generator: torch.Generator, best: bool = True
) -> Pool:
    """Keep up to so many of the samples in the tail, and of those in the body.

    Args:
        rewards: of all samples [n].
        threshold: the tail is above it; below it where `best` is False.
        tail, body: 1 or more.

    Raises InputError if the tail has no sample.
    """
    inside = rewards > threshold if best else rewards < threshold
    if not inside.any():
        where = f"above {threshold:g}; the highest is {rewards.max():g}"
        where = where if best else f"below {threshold:g}; the lowest is {rewards.min():g}"
        raise InputError(f"the tail has no sample: none of {len(rewards)} rewards is {where}")
    return strata(inside, tail=tail, body=body, generator=generator)
