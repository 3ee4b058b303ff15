"""A multilayer perceptron of (x, t) for low-dimensional problems, zero at the start."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]


class Mlp(Settings):
    name: Literal["mlp"] = "mlp"
    dimension: Count = 2
    """Dimension of x."""
    outputs: Count | None = None
    """Dimension of the output: by default that of x; 1 for a value function."""
    hidden: Count = 128
    """Width of the hidden layers."""
    layers: Count = 3
    """Number of hidden layers."""

    def build(self) -> nn.Module:
        return MlpModule(self)


class MlpModule(nn.Module):
    """(x [batch, dimension], time [batch]) -> [batch, outputs]."""

    def __init__(self, settings: Mlp):
        super().__init__()
        widths = [settings.dimension + 7] + settings.layers * [settings.hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(settings.hidden, settings.outputs or settings.dimension)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = time[:, None]
        angle = t * (torch.pi * torch.tensor([1.0, 2.0, 4.0], dtype=x.dtype, device=x.device))
        return self.head(self.body(torch.cat([x, t, angle.cos(), angle.sin()], 1)))  # type: ignore[no-any-return]
