"""A small velocity field that several tests tune."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Curved(nn.Module):
    """A velocity with three parameters, in two dimensions."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b, c = self.values
        return a * x + b * t.reshape(-1, 1) * x.flip(1) + c * torch.tanh(x)
