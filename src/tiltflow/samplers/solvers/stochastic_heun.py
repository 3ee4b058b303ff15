r"""Heun's method with fresh noise after each step.

A step goes past its end, from t to s' = s + eta (s_next - s) / 2 by Heun's method, and returns to s by adding noise:

    x_s = (s / s') x_s' + sqrt((1 - s)^2 - (s / s')^2 (1 - s')^2) eps.

On the linear path x_s' = s' x_1 + (1 - s') x_0 becomes s x_1 plus noise of standard deviation 1 - s, so the second half leaves
all marginals as they are, without any error: that of the sampler is the one of Heun's method, in steps that are the longer the
more noise there is. An SDE in steps of Euler-Maruyama has an error in each step's mean and variance, which is what makes it
need many. (The idea is that of the stochastic sampler of Karras et al., arXiv 2206.00364, algorithm 2, with the noise after the
step.)
"""

# Mutation tests: test_sampler.py

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from tiltflow.flows.field import Velocity
from tiltflow.samplers.solver import StochasticSolver
from tiltflow.samplers.solvers.heun import heun_step

BEYOND = 0.5
"""How far a step goes past its end at eta = 1, in lengths of the next one."""


class StochasticHeun(StochasticSolver):
    """Heun's method with fresh noise after each step: random, and as accurate as an ODE in few steps."""

    order = 2
    uses_eta = True

    @property
    def has_noise(self) -> bool:
        return self.eta > 0

    def states(self, velocity: Velocity, x: Tensor, times: Tensor, noise: Callable[[Tensor], Tensor]) -> list[Tensor]:
        states = [x]
        for start, end, later in zip(times, times[1:], times[2:], strict=False):
            past = end + self.eta * BEYOND * (later - end)
            there = heun_step(velocity, states[-1], start, past)
            s, back = end.item(), (end / past).item()
            variance = (1 - s) ** 2 - (back * (1 - past.item())) ** 2
            states.append(back * there + math.sqrt(variance) * noise(x))
        states.append(heun_step(velocity, states[-1], times[-2], times[-1], singular_end=True))
        return states
