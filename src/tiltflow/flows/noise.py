"""The noise end of a flow."""

# Mutation tests: test_sampler.py

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.flows.flow import Flow
from tiltflow.streams import normal


def noise(flow: Flow, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Starting points [batch, *event] on the linear path: standard normal in the coordinates of the flow's interpolant."""
    draw = normal(shape, generator, dtype)
    c = flow.interpolant(torch.zeros((), dtype=torch.float64))
    return draw / (c.alpha + c.beta).item()
