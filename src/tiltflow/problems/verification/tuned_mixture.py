"""The network that is tuned where the base is a mixture: its exact field, and a correction that sees what the base knows.

A network that is tuned begins with the features of its base. A correction of (x, t) alone would have none: in many dimensions
it must find out from the coordinates which mode a state belongs to, and where modes differ in width that is in the norm, which
a perceptron learns badly. So the perceptron sees, beside x and t,

    the responsibilities of the modes at (x, t), from which the base computes its velocity
    the norm, as sqrt(d) log((1 + |x|^2 / d) / 2), whose spread is the same in any dimension d, and which grows slowly,

and answers with a vector, a multiple of x and one of the base's velocity: across the span of the means that is all a tilt
changes, as modes there move along x, each at a rate of its own. Nothing of it knows the reward or its temperature.
"""

# Mutation tests: test_problems.py

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tiltflow.laws.gaussian_mixture import GaussianMixture
from tiltflow.networks.mlp import Mlp
from tiltflow.streams import new_network


class TunedMixture(nn.Module):
    """The exact velocity of a mixture plus a learned correction, zero at the start."""

    def __init__(self, law: GaussianMixture, hidden: int, layers: int, seed: int):
        super().__init__()
        modes, self.dimension = law.means.shape
        self.law = law
        settings = Mlp(dimension=self.dimension + modes + 1, outputs=self.dimension + 2, hidden=hidden, layers=layers)
        self.correction = new_network(settings, seed)
        # few numbers beside many coordinates count as much as all of these together
        self.scale = math.sqrt(settings.dimension / (modes + 1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        velocity, responsibilities = self.law.velocity_and_responsibilities(x, time)
        norm = math.sqrt(self.dimension) * ((1 + x.square().mean(1, keepdim=True)) / 2).log()
        features = self.scale * torch.cat([responsibilities, norm], 1)
        vector, of_x, of_velocity = self.correction(torch.cat([x, features], 1), time).split([self.dimension, 1, 1], 1)
        return velocity + vector + of_x * x + of_velocity * velocity  # type: ignore[no-any-return]
