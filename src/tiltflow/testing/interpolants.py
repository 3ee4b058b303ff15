"""An interpolant against its definition: a path from noise to data, with its own derivatives."""

# Mutation tests: test_testing.py

from __future__ import annotations

import math

import torch

from tiltflow.flows.interpolant import Interpolant, linear_time


def check_interpolant(interpolant: Interpolant) -> None:
    """Check that alpha rises to 1 and beta falls to 0, that the derivatives are theirs, and that the times fit each other.

    Raises AssertionError.
    """
    s = (torch.arange(97, dtype=torch.float64) + 1 / math.pi) / 97  # on no knot of a discrete schedule
    step = 1e-7
    c, above, below = interpolant(s), interpolant(s + step), interpolant(s - step)
    assert (c.alpha.diff() > 0).all(), "alpha must rise from noise to data"
    assert (c.beta.diff() < 0).all(), "beta must fall from noise to data"
    end = interpolant(torch.ones((), dtype=torch.float64))
    assert abs(end.alpha.item() - 1) < 1e-6, f"alpha must end at 1, ends at {end.alpha.item():g}"
    assert abs(end.beta.item()) < 1e-6, f"beta must end at 0, ends at {end.beta.item():g}"
    for name in ("alpha", "beta"):
        claimed = getattr(c, f"d_{name}")
        found = (getattr(above, name) - getattr(below, name)) / (2 * step)
        wrong = (claimed - found).abs() > 1e-4 * (1 + found.abs())
        assert not wrong.any(), f"d_{name} is not the derivative of {name} at s = {s[wrong][0].item():.3f}"
    back = interpolant.own_time(linear_time(interpolant, s))
    assert torch.allclose(back, s, atol=1e-6), "own_time must be the inverse of linear_time"
    assert interpolant.network_time(s).isfinite().all(), "network_time must be finite"
