"""Trajectory consistency sampling, with any noise."""

# Mutation tests: test_sampler.py test_distilled_to_few_steps.py

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Clock, linear_clock
from tiltflow.samplers.solver import ChainSolver


def tcd(times: Tensor, inner: Tensor) -> Chain:
    """Strategic stochastic sampling of TCD (2402.19159, algorithm 4): each step jumps to an inner time u beyond its end t', and
    goes back from there with fresh noise, x' = (t' / u) (u x1hat + (1 - u) x0hat) + std eps.

    With std^2 = (1 - t')^2 - (t' (1 - u) / u)^2, here in its factors, the noise of x' is that of the path at t'. At u = t' the
    step is that of `euler`, and at u = 1 that of `consistency`; in between it is DDIM with another share of fresh noise.

    Args:
        inner: u [K], at t' or later.
    """
    t, s = times[:-1], times[1:]
    kept = s * (1 - inner) / inner
    return Chain(times, s + kept, s * (1 - t) - kept * t, ((1 - s / inner) * (1 - s + kept)).sqrt())


@dataclass(frozen=True)
class Tcd(ChainSolver):
    """Trajectory consistency sampling, as TCD models are sampled, most of them with eta = 0.3: of the time that is left after a
    step, by the clock of the model, it jumps this share further, and comes back.

    Args:
        clock: of the model that is sampled.
    """

    clock: Clock = linear_clock

    uses_eta = True
    order = 0  # smaller steps bring no law nearer but that of the model that it is for
    bias = "draws the law of a model that was distilled to it, and of no other"

    @property
    def has_noise(self) -> bool:
        return self.eta > 0

    @property
    def is_memoryless(self) -> bool:
        return self.eta > 0  # of many small steps each forgets the same share

    def chain(self, times: Tensor) -> Chain:
        inner = times[1:] if self.eta == 0 else torch.maximum(self.clock(times[1:], self.eta), times[1:])
        return tcd(times, inner)
