"""Heun's method."""

# Mutation tests: test_sampler.py

from __future__ import annotations

from torch import Tensor

from tiltflow.flows.field import Velocity
from tiltflow.samplers.solver import OdeSolver


def heun(velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
    """The probability-flow ODE by Heun's method, order 2, two evaluations a step but one in the last, whose end is singular
    for some predictions."""
    states = [x]
    for k in range(len(times) - 1):
        h = (times[k + 1] - times[k]).item()
        v = velocity(x, times[k])
        end = x + h * v
        x = end if k == len(times) - 2 else x + h / 2 * (v + velocity(end, times[k + 1]))
        states.append(x)
    return states


class Heun(OdeSolver):
    """The probability-flow ODE by Heun's method."""

    order = 2

    def states(self, velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
        return heun(velocity, x, times)
