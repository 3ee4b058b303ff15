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
        states.append(heun_step(velocity, states[-1], times[k], times[k + 1], singular_end=k == len(times) - 2))
    return states


def heun_step(velocity: Velocity, x: Tensor, start: Tensor, end: Tensor, *, singular_end: bool = False) -> Tensor:
    """One step, or Euler's if the velocity at its end is not to be asked for."""
    h = (end - start).item()
    v = velocity(x, start)
    there = x + h * v
    return there if singular_end else x + h / 2 * (v + velocity(there, end))


class Heun(OdeSolver):
    """The probability-flow ODE by Heun's method."""

    order = 2

    def states(self, velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
        return heun(velocity, x, times)
