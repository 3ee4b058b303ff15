"""A method on a Gaussian, whose target law is known: its gradient leads there from both sides."""

# Mutation tests: test_testing.py

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltflow.flows.flow import Flow
from tiltflow.streams import stream
from tiltflow.testing.gaussian import Shifted
from tiltflow.training.batch import Batch
from tiltflow.training.method import Method

BATCH, BATCHES = 512, 12
STEPS = 10_000
"""Optimizer steps after which a method that tilts round by round has settled."""


def check_method(method: Method, *, batch_size: int = BATCH, batches: int = BATCHES) -> None:
    """Check that a method pulls a model toward the law that it says it aims at, from below and from above.

    The base is N(0, 1), the reward is x, so the law is N(m, 1) with m the slope of the target in x. The tuned field is that
    of N(mean, 1): at half of m the gradient must raise the mean, at one and a half times m lower it, each by more than four
    standard errors.

    Raises AssertionError.
    """
    ends = method.target(STEPS).log_tilt(torch.tensor([0.0, 1.0]))
    target = (ends[1] - ends[0]).item()
    assert math.isfinite(target), f"log_tilt is {target} for a reward of 1"
    assert target != 0, "log_tilt does not depend on the reward: the method aims at the base"
    for factor in (0.5, 1.5):
        found = torch.tensor([slope_at(method, factor * target, i, batch_size) for i in range(batches)], dtype=torch.float64)
        mean, error = found.mean().item(), found.std().item() / math.sqrt(batches)
        away = math.copysign(1, factor - 1) * math.copysign(1, target)
        assert mean * away > 4 * error, (
            f"the law that the method says it aims at has the mean {target:.3g}; at {factor * target:.3g} its gradient in the"
            f" mean is {mean:.2g} ± {error:.2g}, which does not lead there"
        )


def slope_at(method: Method, mean: float, seed: int, batch_size: int) -> float:
    """The gradient of one batch in the mean of the tuned model."""
    tuned, base = Flow(Shifted(mean)), Flow(Shifted())
    x = torch.randn(batch_size, 1, generator=stream(seed, "check method"))

    def reward(x: Tensor) -> Tensor:
        return x[:, 0]

    state = method.new_state((1,), seed, torch.device("cpu"))
    batch = Batch(x, tuned, base, reward, stream(seed, "rollout"))
    next(iter(method.gradients(batch, state)))
    (parameter,) = tuned.parameters()
    assert parameter.grad is not None, "the method leaves no gradient in the parameters of the tuned model"
    return parameter.grad.item()
