"""A value function of tokens, such as patches of latents: a perceptron of each, of its place, and of the mean of all."""

# Mutation tests: test_value.py

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.networks.unet import sinusoids
from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]


class TokenCritic(Settings):
    name: Literal["token-critic"] = "token-critic"
    tokens: Count = 256
    """Number of tokens."""
    channels: Count = 64
    """Channels of a token."""
    hidden: Count = 128
    """Width of the hidden layers."""

    def build(self) -> nn.Module:
        return TokenCriticModule(self)


class TokenCriticModule(nn.Module):
    """(tokens [batch, tokens, channels], time [batch] in [0, 1]) -> [batch, 1]; 0 at the start."""

    def __init__(self, settings: TokenCritic):
        super().__init__()
        self.width = settings.hidden
        self.time = nn.Linear(self.width, self.width)
        self.first = nn.Linear(settings.channels, self.width)
        self.places = nn.Parameter(torch.randn(settings.tokens, self.width))
        self.second = nn.Linear(2 * self.width, self.width)
        self.head = nn.Linear(self.width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = F.silu(self.first(x) + self.places + self.time(sinusoids(1000 * time, self.width))[:, None])
        h = F.silu(self.second(torch.cat([h, h.mean(1, keepdim=True).expand_as(h)], 2)))
        return self.head(h.mean(1))  # type: ignore[no-any-return]
