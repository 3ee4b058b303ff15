"""A utility as a function of the law: its first variation is a reward, the same twice, and the change of its value."""

# Mutation tests: test_testing_utilities.py

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.rewards.functions.checked import evaluate, value_and_gradient
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation
from tiltflow.utilities.estimation.known import Known, Need

MOVE, SHIFT, NEAR = 1e-3, 0.02, 0.05
"""How far samples move, in standard deviations; how far weights; and how near the change must be."""
OF_LAWS: tuple[Need, ...] = ("score", "log_ratio", "log_odds")
"""What changes with the law, and is known at this law alone."""


def check_utility(utility: Utility, at: Known) -> None:
    """Check that a utility has a finite value with an error, and a first variation that is a finite number of each sample
    alone, the same twice, with the gradient that it claims; and that the value changes by as much as the first variation says,
    when samples move along its gradient, and when weights move toward where it is high.

    Values that are made of scores, log ratios or log odds are not compared: how those change with the law is not known.

    Args:
        at: a hundred samples or more, with rewards as functions.

    Raises AssertionError; InputError and UserCodeError for what cannot be called at all.
    """
    value = utility.value(at)
    assert torch.tensor([value.value, value.standard_error]).isfinite().all(), f"the value is not finite: {value}"
    assert utility.value(at) == value, "the value is not the same twice: draw from at.seed"
    slope = _bound(utility.first_variation(at), at)
    values, gradient = value_and_gradient(slope, at.x)
    again, _ = value_and_gradient(_bound(utility.first_variation(at), at), at.x)
    assert torch.equal(values, again), "the first variation is not the same twice: draw from at.seed"
    with torch.no_grad():
        few = torch.cat([evaluate(slope.select(slice(i, i + 1)), at.x[i : i + 1]) for i in range(4)])
    size = values.abs().max()
    assert (few - values[:4]).abs().max() <= 1e-4 * (1 + size), "the first variation of a sample changes with its neighbours"
    values, gradient = values.double(), gradient.double()
    if slope.valued:
        assert values.std() > 0, "the first variation is the same everywhere"
        _check_gradient(slope, at.x, gradient)
    if set(utility.needs) & set(OF_LAWS) or set(utility.value_needs) & set(OF_LAWS):
        return
    scale = gradient.square().flatten(1).sum(1).mean().sqrt()
    assert scale > 0, "the gradient of the first variation is zero everywhere"
    along = gradient / scale * at.x.double().std()

    def moved(step: float) -> Known:
        return replace(at, x=at.x + (step * along).to(at.x), rewards={})

    claimed = float(at.p @ (gradient * along).flatten(1).sum(1))
    _agree(_slope(utility, moved, MOVE), claimed, "samples move along the gradient of the first variation")
    if not slope.valued:
        return
    toward = at.p * (1 + ((values - at.mean(values)) / values.std()).tanh() / 2)
    toward = toward / toward.sum()

    def weighted(step: float) -> Known:
        return replace(at, weights=(1 - step) * at.p + step * toward)

    try:
        found = _slope(utility, weighted, SHIFT)
    except InputError:
        if at.weights is None:
            return  # it takes samples without weights
        raise
    _agree(found, float((toward - at.p) @ values), "weights move toward where the first variation is high")


def _bound(slope: FirstVariation, at: Known) -> FirstVariation:
    """The first variation of samples with the labels that are known."""
    return slope if at.labels is None else slope.given([""] * len(at.x), [{"label": int(each)} for each in at.labels])


def _slope(utility: Utility, at: Callable[[float], Known], step: float) -> float:
    return (utility.value(at(step)).value - utility.value(at(-step)).value) / (2 * step)


def _agree(found: float, claimed: float, when: str) -> None:
    ratio = found / claimed
    assert abs(ratio - 1) < NEAR, f"the value changes by {ratio:.3g} times what the first variation says when {when}"


def _check_gradient(slope: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> None:
    """By finite differences; of nine samples in ten, as there may be kinks."""
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    claimed = (gradient * direction).flatten(1).sum(1)
    size, found = claimed.abs().max(), []
    for step in (1e-2, 1e-3):
        with torch.no_grad():
            up, down = (slope(x + sign * step * direction).double() for sign in (1, -1))
        found.append((up - down) / (2 * step))
    misfit = torch.stack([(claimed - each).abs() for each in found]).amin(0).quantile(0.9)
    assert misfit <= 0.02 * size, f"the gradient of the first variation is off by {misfit / size:.1%} of the largest"
