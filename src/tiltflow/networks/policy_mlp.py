"""A multilayer perceptron of actions, time and an observation: the field of a flow policy."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tiltflow.policies.standardise import Standardise
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
    """

    def __init__(self, settings: PolicyMlp):
        super().__init__()
        (size,) = settings.event_shape
        self.observations = Standardise(settings.observation_dim)
        widths = [size + settings.observation_dim + 7] + settings.layers * [settings.hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(settings.hidden, size)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, time: Tensor, observations: Tensor) -> Tensor:
        t = time[:, None]
        angle = t * (torch.pi * torch.tensor([1.0, 2.0, 4.0], dtype=x.dtype, device=x.device))
        seen = self.observations(observations)
        return self.head(self.body(torch.cat([x, seen, t, angle.cos(), angle.sin()], 1)))  # type: ignore[no-any-return]
