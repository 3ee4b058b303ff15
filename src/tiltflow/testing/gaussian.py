"""A Gaussian on the linear path: the field, and what a solver makes of it, in closed form."""

# Mutation tests: test_testing.py

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiltflow.samplers.chain import Chain
from tiltflow.samplers.solver import StochasticSolver

MEAN, STD = 0.7, 0.5


def slope(t: Tensor, std: float = STD) -> Tensor:
    """d v / d x of the field of N(m, std^2), whose x_t is N(t m, (t std)^2 + (1 - t)^2)."""
    return (t * std**2 - (1 - t)) / ((t * std) ** 2 + (1 - t) ** 2)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """The field of N(MEAN, STD^2) at x [batch]."""
    return MEAN + slope(t) * (x - t * MEAN)


def spread(t: Tensor) -> Tensor:
    """The standard deviation of x_t."""
    return ((t * STD) ** 2 + (1 - t) ** 2).sqrt()


def law_of(chain: Chain) -> tuple[float, float, float]:
    """Mean and variance at the end of a chain that begins at x_t of its first time, and how much of its start is left."""
    mean, variance, gain = chain.times[0] * MEAN, spread(chain.times[0]) ** 2, torch.ones((), dtype=torch.float64)
    for k, t in enumerate(chain.times[:-1]):
        factor = chain.x_scale[k] + chain.v_scale[k] * slope(t)
        mean = factor * mean + chain.v_scale[k] * MEAN * (1 - slope(t) * t)
        variance = factor**2 * variance + chain.std[k] ** 2
        gain = gain * factor
    return mean.item(), variance.item(), gain.item()


def law_of_states(solver: StochasticSolver, times: Tensor) -> tuple[float, float]:
    """Mean and variance at the end of a stochastic solver that begins at x_t of its first time. Its end is affine in its start
    and in its noise, so that one run with each of them changed by a unit says what it makes of all."""
    count = len(times) - 1
    start = torch.zeros(count + 2, dtype=torch.float64)
    start[1] = 1  # run 0 is without noise, run 1 from another start, run 2 + k with noise k

    drawn: list[Tensor] = []

    def noise(x: Tensor) -> Tensor:
        unit = torch.zeros_like(x)
        unit[2 + len(drawn)] = 1
        drawn.append(unit)
        return unit

    ends = solver.states(velocity, start + MEAN * times[0], times, noise)[-1]
    gains = ends[1:] - ends[0]
    variance = (gains[0] * spread(times[0])) ** 2 + gains[1:].square().sum()
    return ends[0].item(), variance.item()


class Shifted(nn.Module):
    """The field of N(mean, 1) at x [batch, 1], the mean being the parameter."""

    def __init__(self, mean: float = 0.0) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = time.reshape(-1, 1)
        return self.mean + slope(t, 1.0) * (x - t * self.mean)
