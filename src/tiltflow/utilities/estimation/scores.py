r"""The score of the law that a velocity field samples, read from the field just before the data.

With x_t = t x_1 + (1 - t) x_0 the score of x_t is (t v - x) / (1 - t), and t times it at t x is the score at x of x_t / t,
which is x_1 with noise of standard deviation e = (1 - t) / t: t^2 (v(t x, t) - x) / (1 - t). It is that of x_1 up to order e^2;
without the factors t, at x itself, only up to order e. Errors of the field count 1 / e times.
"""

# Mutation tests: test_utility_estimation.py

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.flows.field import VelocityField, Which

TIME = 0.98
"""Time at which fields are asked."""


@dataclass(frozen=True)
class Score:
    """The gradient of log p(x) at x [batch, *event].

    Args:
        field: bound to the conditions of the samples, if it has any.
        time: the time 1 - eps at which it is asked, in (0, 1).
    """

    field: VelocityField
    time: float = TIME

    def __post_init__(self) -> None:
        if not 0 < self.time < 1:
            raise InputError(f"the time of a score must be above 0 and below 1, where the data are, is {self.time:g}")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        t = self.time
        velocity = self.field(t * x, torch.tensor(t, dtype=torch.float64, device=x.device))
        return t**2 / (1 - t) * (velocity - x)

    def select(self, which: Which) -> Score:
        """The score of these samples of the batch."""
        return replace(self, field=self.field.select(which))
