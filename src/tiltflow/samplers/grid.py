"""Time grids: the times at which a sampler evaluates the velocity."""

# Mutation tests: test_sampler.py

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Start = float | Callable[[int], Tensor]
"""The start of sampling: a time, from which the grid of `Sampling` is spread; or the grid of a model that has its own, from the
number of steps K to K + 1 times, float64."""


def time_grid(num_inference_steps: int, *, start: float = 0.0, shift: float = 1.0) -> Tensor:
    """K + 1 times from `start` to 1, float64, spread by `spread_times`."""
    return spread_times(torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float64), start=start, shift=shift)


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
