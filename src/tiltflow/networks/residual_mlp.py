"""A perceptron of (x, t) with residual blocks, for flows of latents in some tens of dimensions; zero at the start."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]


class ResidualMlp(Settings):
    name: Literal["residual-mlp"] = "residual-mlp"
    dimension: Count = 16
    """Dimension of x."""
    hidden: Count = 192
    """Width of the residual stream."""
    blocks: Count = 3
    """Residual blocks of two layers each."""
    frequencies: Annotated[int, Field(ge=1, le=8)] = 6
    """Frequencies at which the blocks see the time, from half a wave between noise and data on, each twice the last."""

    def build(self) -> nn.Module:
        return ResidualMlpModule(self)


class Block(nn.Module):
    """Two layers, zero at the start; the time is added between them."""

    def __init__(self, hidden: int, embedding: int):
        super().__init__()
        self.norm, self.first, self.time = nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.Linear(embedding, hidden)
        self.last = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return h + self.last(F.silu(self.first(self.norm(h)) + self.time(embedding)))  # type: ignore[no-any-return]


class ResidualMlpModule(nn.Module):
    """(x [batch, dimension], time [batch]) -> [batch, dimension]."""

    def __init__(self, settings: ResidualMlp):
        super().__init__()
        self.settings = settings
        self.enter = nn.Linear(settings.dimension, settings.hidden)
        self.blocks = nn.ModuleList(Block(settings.hidden, 2 * settings.frequencies) for _ in range(settings.blocks))
        self.norm = nn.LayerNorm(settings.hidden)
        self.leave = nn.Linear(settings.hidden, settings.dimension)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        waves = torch.pi * 2.0 ** torch.arange(self.settings.frequencies, dtype=x.dtype, device=x.device)
        angle = time[:, None].to(x.dtype) * waves
        embedding, h = torch.cat([angle.cos(), angle.sin()], 1), self.enter(x)
        for block in self.blocks:
            h = block(h, embedding)
        return self.leave(F.silu(self.norm(h)))  # type: ignore[no-any-return]
