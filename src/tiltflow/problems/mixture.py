"""A mixture of Gaussians under a linear or quadratic reward."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator

from tiltflow.laws.gaussian_mixture import GaussianMixture, Vector, mixture, vector
from tiltflow.problems.verification.quadratic_tilt import QuadraticTilt

Positive = Annotated[float, Field(gt=0)]


class Mixture(QuadraticTilt):
    """A mixture of Gaussians under a linear or quadratic reward: a ring of equal ones, unless `means` are given."""

    name: Literal["mixture"] = "mixture"
    modes: Annotated[int, Field(ge=1)] = 8
    """Number of modes on the ring."""
    radius: Annotated[float, Field(ge=0)] = 2.0
    """Radius of the ring, in the first two coordinates."""
    means: Annotated[tuple[tuple[float, ...], ...], Field(min_length=1)] | None = None
    """Means of the modes, one list each, instead of the ring; missing numbers are 0."""
    weights: tuple[Positive, ...] | None = None
    """Weights of the modes, of any sum; equal by default."""
    scale: Positive | tuple[Positive, ...] = 0.6
    """Standard deviation of the modes: one for all, or one for each."""
    linear: Vector = (1.0, 0.5)

    @model_validator(mode="after")
    def _check_modes(self) -> Mixture:
        if self.means is None and self.dimension < 2:
            raise ValueError("a ring needs dimension 2 or more; give means=[[..], ..] instead")
        if self.means is not None and max((len(mean) for mean in self.means), default=0) > self.dimension:
            raise ValueError(f"a mean has more numbers than dimension {self.dimension}")
        modes = self.modes if self.means is None else len(self.means)
        for name, value in (("weights", self.weights), ("scale", self.scale)):
            if isinstance(value, tuple) and len(value) != modes:
                raise ValueError(f"{name} has {len(value)} numbers for {modes} modes")
        return self

    def base(self) -> GaussianMixture:
        """The ring, or the mixture of `means`."""
        if self.means is not None:
            means = torch.stack([vector(mean, self.dimension) for mean in self.means])
        else:
            angle = torch.arange(self.modes, dtype=torch.float64) * (2 * math.pi / self.modes)
            means = torch.zeros(self.modes, self.dimension, dtype=torch.float64)
            means[:, 0], means[:, 1] = self.radius * angle.cos(), self.radius * angle.sin()
        return mixture(means, self.weights or (1.0,) * len(means), self.scale)
