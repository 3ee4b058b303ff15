"""Samples mixed with fresh noise: where conditional flow matching regresses a velocity."""

# Mutation tests: test_orw_cfm_w2.py test_noising.py

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tiltflow.flows.field import VelocityField
from tiltflow.flows.interpolant import expand
from tiltflow.samplers.grid import Start, spread_times
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import normal


class Points(NamedTuple):
    """Points of paths from noise to samples.

    Args:
        which: the sample at the end of each path [count].
        x: x_t = t x_1 + (1 - t) x_0, [count, *event].
        t: times [count], float64.
        u: x_1 - x_0, the velocity of each path [count, *event].
    """

    which: Tensor
    x: Tensor
    t: Tensor
    u: Tensor


@dataclass(frozen=True)
class Noising:
    """Pairs of noise and samples with a time each; `points` mixes them.

    Args:
        samples: x_1 [batch, *event].
        which: the sample of each pair [count].
        noise: x_0 [count, *event].
        times: [count], float64.
    """

    samples: Tensor
    which: Tensor
    noise: Tensor
    times: Tensor

    def points(self, part: slice) -> Points:
        """The points of these pairs."""
        which, x0, t = self.which[part], self.noise[part], self.times[part]
        x1 = self.samples[which]
        return Points(which, expand(1 - t, x0) * x0 + expand(t, x0) * x1, t, x1 - x0)


def shuffled(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` indices of `count` samples: each once before any is there twice."""
    rounds = range(-(-size // count))
    return torch.cat([torch.randperm(count, generator=generator, device=generator.device) for _ in rounds])[:size]


def noising(
    flow: VelocityField,
    samples: Tensor,
    which: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    start: Start = 0.0,
    pair: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Noising:
    """Draw noise and a time for each of some samples: one time in each of equally many parts of the time axis, spread as the
    steps of the sampler are. That is the same mean as of independent times, with less noise.

    Args:
        flow: bound to the conditions of the samples; its noise is drawn.
        samples: [batch, *event].
        which: indices of the samples [count].
        sampling: whose shift, and time of the first step from `start`, the times have.
        pair: (x_0, x_1) [count, *event] -> the index of the noise of each sample; as drawn by default.
    """
    size = len(which)
    x0 = normal((size, *samples.shape[1:]), generator, samples.dtype)
    if pair is not None:
        x0 = x0[pair(x0, samples[which])]
    x0 = flow.select(which).project(x0)
    parts = torch.arange(size, device=samples.device)
    uniform = parts + torch.rand(size, generator=generator, device=samples.device, dtype=torch.float64)
    t = spread_times(uniform / size, start=sampling.times(start)[0].item(), shift=sampling.shift)
    return Noising(samples, which, x0, t)
