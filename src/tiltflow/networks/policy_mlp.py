"""A multilayer perceptron of actions, time and an observation: the field of a flow policy."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]


class PolicyMlp(Settings):
    """Its sizes; by default those of arXiv 2601.14234."""

    name: Literal["policy-mlp"] = "policy-mlp"
    observation_dim: Count
    """Numbers of an observation."""
    action_dim: Count
    """Numbers of an action."""
    horizon: Count = 1
    """Actions in a row that are drawn together, and taken one after the other: a chunk."""
    hidden: Count = 512
    """Width of the hidden layers."""
    layers: Count = 4
    """Number of hidden layers."""

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of a chunk of actions, one after the other."""
        return (self.horizon * self.action_dim,)

    def build(self) -> nn.Module:
        return PolicyMlpModule(self)


class PolicyMlpModule(nn.Module):
    """(chunks [batch, horizon * action], time [batch], observations [batch, observation]) -> [batch, horizon * action], zero at
    the start.

    Observations are seen in standard deviations from a mean, buffers that are 1 and 0 until `scale_to` sets them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: PolicyMlp):
        super().__init__()
        (size,) = settings.event_shape
        self.register_buffer("mean", torch.zeros(settings.observation_dim))
        self.register_buffer("std", torch.ones(settings.observation_dim))
        widths = [size + settings.observation_dim + 7] + settings.layers * [settings.hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(settings.hidden, size)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def scale_to(self, observations: Tensor) -> None:
        """See observations in the mean and standard deviation of these [n, observation]; what never changes as it is."""
        self.mean.copy_(observations.mean(0))
        std = observations.std(0, correction=0)
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def forward(self, x: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        t = time[:, None]
        angle = t * (torch.pi * torch.tensor([1.0, 2.0, 4.0], dtype=x.dtype, device=x.device))
        seen = ((observations - self.mean) / self.std).to(x.dtype)
        return self.head(self.body(torch.cat([x, seen, t, angle.cos(), angle.sin()], 1)))  # type: ignore[no-any-return]
