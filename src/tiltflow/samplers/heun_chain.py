r"""Memoryless paths by Heun's method: Gaussian steps whose ends have the law of the ODE, to second order.

A step from t to s goes twice as far by Heun's method, to s' = s + (s - t), and comes back to s by adding noise:

    x_s' = x_t + H vbar,     H = s' - t,     vbar = (v(x_t, t) + v(x_t + H v(x_t, t), s')) / 2
    x_s  = (s / s') x_s' + sqrt((1 - s)^2 - (s / s')^2 (1 - s')^2) eps.

On the linear path the second line leaves the law of the samples as it is, without any error (see `stochastic-heun`), so the
error is that of Heun's method, O(h^2) in steps of h. A step of Euler-Maruyama is off in its mean and its variance, and the law
of its ends by O(h) in each coordinate: in many dimensions, where modes are told apart by the norm, that changes their weights.

Coming back by h adds the variance 2 h (1 - t) / t of a step of the memoryless SDE (2409.08861), so the ends forget where the
paths began as there. Given x_t a step is Gaussian, and its mean is linear in vbar: the chain has the three numbers, the
controls and the path KL of `Chain`, with two evaluations in the place of one. The last step has no noise, and is Euler's: the
velocity at its end is singular for some predictions.
"""

# Mutation tests: test_heun_chain.py

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tiltflow.flows.field import Velocity
from tiltflow.samplers.chain import Chain


@dataclass(frozen=True)
class HeunChain(Chain):
    """A chain whose velocities are means of two. `past` [K]: the time s' that each step goes to, float64."""

    past: Tensor = field(kw_only=True)

    def velocity(self, k: int, velocity: Velocity, x: Tensor) -> Tensor:
        """vbar at x_k = x [batch, *event]; v itself in the step to the data."""
        t, past = self.times[k], self.past[k]
        v = velocity(x, t)
        if past == 1:
            return v
        return (v + velocity(x + (past - t).item() * v, past)) / 2


def heun_chain(times: Tensor) -> HeunChain:
    """The chain on a grid [K + 1], float64. A step goes past its end by its own length, or by half of what is left, if that is
    less."""
    t, s = times[:-1], times[1:]
    past = torch.minimum(2 * s - t, (1 + s) / 2)
    back = s / past
    variance = (1 - s) ** 2 - (back * (1 - past)) ** 2
    return HeunChain(times, back, back * (past - t), variance.sqrt(), past=past)
