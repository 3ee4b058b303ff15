"""Distance of a sample from a centre."""

# Mutation tests: test_rewards_of_points.py

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.rewards import Reward
from tiltflow.settings import Settings


class Norm(Settings):
    """scale * |x - center|, the Euclidean norm of all that a sample has."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "distance"

    name: Literal["norm"] = "norm"
    scale: float = 1.0
    """Factor: negative where near is better."""
    center: float | tuple[float, ...] = 0.0
    """Where the distance is 0: one number for all coordinates, or a list with one for each."""

    @property
    def description(self) -> str:
        return f"distance from {self.center}, times {self.scale:g}"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        def norm(x: Tensor) -> Tensor:
            points = x.flatten(1)
            if isinstance(self.center, tuple) and len(self.center) != points.shape[1]:
                raise InputError(f"reward norm: center has {len(self.center)} numbers, and a sample {points.shape[1]}")
            distance: Tensor = torch.linalg.vector_norm(points - points.new_tensor(self.center), dim=1)
            return self.scale * distance

        return norm
