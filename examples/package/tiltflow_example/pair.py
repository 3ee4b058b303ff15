"""A problem: two Gaussians of unequal weight on a line. The reward is that of every `QuadraticTilt`."""

from typing import Literal

import torch

from tiltflow.laws.gaussian_mixture import GaussianMixture, mixture
from tiltflow.problems.verification.quadratic_tilt import QuadraticTilt


class Pair(QuadraticTilt):
    """Two Gaussians on a line, the right one twice as heavy."""

    name: Literal["pair"] = "pair"
    dimension: Literal[1] = 1
    distance: float = 2.0
    """Between their means."""
    linear: float = 0.5

    def base(self) -> GaussianMixture:
        means = torch.tensor([[-self.distance / 2], [self.distance / 2]], dtype=torch.float64)
        return mixture(means, (1.0, 2.0), 0.4)
