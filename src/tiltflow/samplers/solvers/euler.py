"""Euler's method."""

# Mutation tests: test_sampler.py

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.samplers.chain import Chain
from tiltflow.samplers.solver import ChainSolver


def euler(times: Tensor) -> Chain:
    """The probability-flow ODE by Euler's method, order 1; on a diffusion model it is deterministic DDIM (2010.02502).

    A deterministic path has no path KL: its energy is that of the same change of velocity in the memoryless SDE, the integral
    of 2 t / (1 - t), by the midpoint rule: a transport cost.
    """
    h, middle = times.diff(), (times[:-1] + times[1:]) / 2
    return Chain(times, torch.ones_like(h), h, torch.zeros_like(h), h * 2 * middle / (1 - middle))


class Euler(ChainSolver):
    """The probability-flow ODE by Euler's method."""

    def chain(self, times: Tensor) -> Chain:
        return euler(times)
