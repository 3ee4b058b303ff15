"""The exact velocity field of a Gaussian mixture, plus a perceptron that is zero at the start: a base that is known."""

# Mutation tests: test_mixture_models.py

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tiltflow.networks.mlp import Mlp
from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Point = Annotated[tuple[float, ...], Field(min_length=1)]


class MixtureSettings(Settings):
    """What a mixture sum_i w_i N(m_i, diag(s_i^2)) is, and what corrects its field."""

    means: Annotated[tuple[Point, ...], Field(min_length=1)]
    """The means of the components, each a list of as many numbers as a sample has."""
    weights: tuple[Positive, ...] | None = None
    """Their weights, of any sum; equal by default."""
    scale: Positive | tuple[tuple[Positive, ...], ...] = 1.0
    """Standard deviation: one number, or for each component a list of one for each coordinate."""
    hidden: Count = 128
    """Width of the learned correction to the exact velocity, a perceptron."""
    layers: Count = 3
    """Its number of hidden layers."""

    @model_validator(mode="after")
    def _fit_together(self) -> MixtureSettings:
        count, size = len(self.means), self.dimension
        if any(len(mean) != size for mean in self.means):
            raise ValueError(f"means: all must be as long as the first, {size} long")
        if self.weights is not None and len(self.weights) != count:
            raise ValueError(f"weights: {len(self.weights)} of them, for {count} means")
        if isinstance(self.scale, tuple) and [len(row) for row in self.scale] != count * [size]:
            raise ValueError(f"scale: must be one number, or {count} lists of {size}, as means")
        return self

    @property
    def dimension(self) -> int:
        """Numbers of a sample."""
        return len(self.means[0])


class GaussianMixture(MixtureSettings):
    name: Literal["gaussian-mixture"] = "gaussian-mixture"

    def build(self) -> nn.Module:
        return GaussianMixtureModule(self)


class GaussianMixtureModule(nn.Module):
    """(x [batch, dimension], time [batch]) -> [batch, dimension]: E[x_1 - x_0 | x_t = x] of the linear path, corrected."""

    log_weights: Tensor
    means: Tensor
    variances: Tensor

    def __init__(self, settings: GaussianMixture):
        super().__init__()
        means = torch.tensor(settings.means)
        scale = torch.tensor(settings.scale).expand_as(means)
        weights = torch.tensor(settings.weights or len(means) * (1.0,))
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means)
        self.register_buffer("variances", scale**2)
        self.correction = Mlp(dimension=settings.dimension, hidden=settings.hidden, layers=settings.layers).build()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        # at the data the field of every law is x, so nothing is to correct there; and a score that is read just before, where
        # it is (t v - x) / (1 - t), has the error of the perceptron, not that over 1 - t
        return self.exact(x, time) + (1 - time[:, None]) * self.correction(x, time)  # type: ignore[no-any-return]

    def exact(self, x: Tensor, time: Tensor) -> Tensor:
        """The field of the mixture: that of each component, by its share in the density of x at this time."""
        t = time[:, None, None]
        total = t**2 * self.variances + (1 - t) ** 2  # variances of x_t: [batch, components, dimension]
        away = x[:, None] - t * self.means
        log_density = -(away**2 / total + total.log()).sum(2) / 2
        share = torch.softmax(self.log_weights + log_density, 1)
        slope = (t * self.variances - (1 - t)) / total
        return (share[..., None] * (self.means + slope * away)).sum(1)
