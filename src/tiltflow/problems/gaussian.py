"""A Gaussian base under a linear or quadratic reward."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tiltflow.laws.gaussian_mixture import GaussianMixture, Vector, mixture, vector
from tiltflow.problems.verification.quadratic_tilt import QuadraticTilt


class Gaussian(QuadraticTilt):
    """A Gaussian base N(mean, scale^2 I) under a linear or quadratic reward."""

    name: Literal["gaussian"] = "gaussian"
    mean: Vector = 0.7
    """Mean of the base: one number for all coordinates, or a list whose missing numbers are 0."""
    scale: Annotated[float, Field(gt=0)] = 0.5
    """Standard deviation of the base."""
    linear: Vector = 1.7

    @model_validator(mode="after")
    def _check_mean(self) -> Gaussian:
        self._check_length("mean", self.mean)
        return self

    def base(self) -> GaussianMixture:
        """N(mean, scale^2 I)."""
        return mixture(vector(self.mean, self.dimension)[None], (1.0,), self.scale)
