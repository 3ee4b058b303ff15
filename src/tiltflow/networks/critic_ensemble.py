"""An ensemble of critics: perceptrons of actions and an observation with layer normalisation, evaluated together."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.policies.standardise import Standardise
from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]


class CriticEnsemble(Settings):
    """Its sizes; by default those of arXiv 2601.14234."""

    name: Literal["critic-ensemble"] = "critic-ensemble"
    observation_dim: Count
    """Numbers of an observation."""
    actions: Count
    """Numbers of a chunk of actions."""
    members: Count = 10
    """Critics, each with weights of its own."""
    hidden: Count = 512
    """Width of the hidden layers."""
    layers: Count = 4
    """Number of hidden layers."""

    def build(self) -> nn.Module:
        return CriticEnsembleModule(self)


class CriticEnsembleModule(nn.Module):
    """(chunks [batch, actions], observations [batch, observation]) -> values [members, batch]."""

    def __init__(self, settings: CriticEnsemble):
        super().__init__()
        self.observations = Standardise(settings.observation_dim)
        widths = [settings.actions + settings.observation_dim] + settings.layers * [settings.hidden]
        self.body = nn.ModuleList(Layer(settings.members, *pair) for pair in pairwise(widths))
        self.head = Linear(settings.members, settings.hidden, 1)

    def forward(self, x: Tensor, observations: Tensor) -> Tensor:
        h = torch.cat([x, self.observations(observations)], 1).expand(self.head.weight.shape[0], -1, -1)
        for layer in self.body:
            h = layer(h)
        return self.head(h)[..., 0]  # type: ignore[no-any-return]


class Linear(nn.Module):
    """[members, batch, inputs] -> [members, batch, outputs], each member by weights of its own, which begin as torch's do."""

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, h: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, h, self.weight)


class Layer(nn.Module):
    """A linear map, GELU, and a normalisation over the hidden units of a member."""

    def __init__(self, members: int, inputs: int, outputs: int):
        super().__init__()
        self.linear = Linear(members, inputs, outputs)
        self.scale = nn.Parameter(torch.ones(members, 1, outputs))
        self.shift = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, h: Tensor) -> Tensor:
        h = F.gelu(self.linear(h))
        return F.layer_norm(h, h.shape[-1:]) * self.scale + self.shift
