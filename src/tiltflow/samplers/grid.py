"""Time grids: the times at which a sampler evaluates the velocity."""

# Mutation tests: test_sampler.py

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Clock = Callable[[Tensor, float], Tensor]
"""(times on the linear path, share) -> times on it that are nearer to data by this share of what is left to it, in the time of
a model, which may be another."""


def linear_clock(times: Tensor, share: float) -> Tensor:
    """The clock of a model whose time is that of the linear path."""
    return 1 - (1 - share) * (1 - times)


@dataclass(frozen=True)
class OwnGrid:
    """The grid of a model that has its own, from K to K + 1 times, and its clock."""

    times: Callable[[int], Tensor]
    clock: Clock

    def __call__(self, num_inference_steps: int) -> Tensor:
        return self.times(num_inference_steps)


Start = float | Callable[[int], Tensor]
"""The start of sampling: a time, from which the grid of `Sampling` is spread; or the grid of a model that has its own, from the
number of steps K to K + 1 times, float64."""


Spacing = Literal["even", "middle"]
"""even: steps of equal length, before any shift. middle: smaller ones in the middle, where they are 2/3 as long, and longer
ones at both ends. What a step leaves between the optimum of a controlled chain and the tilt grows with the square of its
length, and with the curvature of the value function times the variance that the step adds in unit time: that vanishes at both
ends."""


def time_grid(num_inference_steps: int, *, start: float = 0.0, shift: float = 1.0, spacing: Spacing = "even") -> Tensor:
    """K + 1 times from `start` to 1, float64, spread by `spread_times`."""
    u = torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float64)
    return spread_times(smooth_step_inverse(u) if spacing == "middle" else u, start=start, shift=shift)


def smooth_step_inverse(u: Tensor) -> Tensor:
    """t with 3 t^2 - 2 t^3 = u in [0, 1]: times whose density is 6 t (1 - t) where u is uniform."""
    return torch.where((u > 0) & (u < 1), 0.5 - (torch.asin(1 - 2 * u) / 3).sin(), u)


def spread_times(u: Tensor, *, start: float = 0.0, shift: float = 1.0) -> Tensor:
    """u in [0, 1] -> times in [start, 1]. shift > 1 moves them to the noise, as in diffusers' flow schedulers: 1 - u goes to
    shift (1 - u) / (1 + (shift - 1) (1 - u))."""
    noise = 1 - u
    noise = shift * noise / (1 + (shift - 1) * noise)
    return start + (1 - start) * (1 - noise)


def split(times: Tensor, parts: int) -> Tensor:
    """Times [K + 1] with each step split into so many of equal length: [K parts + 1].

    >>> split(torch.tensor([0.0, 0.5, 1.0]), 2).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    within = torch.arange(parts, dtype=times.dtype) / parts
    return torch.cat([(times[:-1, None] + times.diff()[:, None] * within).flatten(), times[-1:]])


def variance_preserving(times: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and beta of a variance-preserving path at linear times: alpha / beta = t / (1 - t), alpha^2 + beta^2 = 1."""
    norm = torch.hypot(times, 1 - times)
    return times / norm, (1 - times) / norm
