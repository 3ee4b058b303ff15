"""A quadratic function of x whose coefficients are polynomials of time: the value function of linear-quadratic problems."""

# Mutation tests: test_value.py

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tiltflow.settings import Settings


class Quadratic(Settings):
    name: Literal["quadratic"] = "quadratic"
    degree: Annotated[int, Field(ge=0)] = 4
    """Degree of the polynomials in time."""

    def build(self) -> nn.Module:
        return QuadraticModule(self)


class QuadraticModule(nn.Module):
    """(x [batch, dimension], time [batch] in [0, 1]) -> a(t) |x|^2 + b(t) sum(x) + c(t), [batch, 1]; 0 at the start."""

    def __init__(self, settings: Quadratic):
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(3, settings.degree + 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        square, linear, constant = self.coefficients @ chebyshev(time, self.coefficients.shape[1] - 1)
        value: Tensor = square * x.square().sum(1) + linear * x.sum(1) + constant
        return value[:, None]


def chebyshev(time: Tensor, degree: int) -> Tensor:
    """Chebyshev polynomials of time [batch] in [0, 1]: [degree + 1, batch]."""
    angle = torch.arccos((2 * time - 1).clamp(-1, 1))
    return torch.stack([(n * angle).cos() for n in range(degree + 1)])
