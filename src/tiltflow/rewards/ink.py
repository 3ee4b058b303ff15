"""Amount of ink: the mean brightness of an image."""

# Mutation tests: test_rewards.py

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from tiltflow.rewards import Reward
from tiltflow.settings import Settings


class Ink(Settings):
    """Mean of (x + 1) / 2 over channels and pixels: 0 for a blank image (all -1), 1 for a full one (all 1).

    Nothing is clipped: a pixel outside [-1, 1] counts as it is. The reward is linear in x, so its gradient is the same
    everywhere, and tilting a Gaussian by it shifts the mean and nothing else.
    """

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "fraction of full ink"

    name: Literal["ink"] = "ink"
    sign: Literal["more", "less"] = "more"
    """Whether `more` ink is better, or `less`."""

    @property
    def description(self) -> str:
        if self.sign == "more":
            return "mean brightness, from 0 (blank) to 1 (all ink)"
        return "minus the mean brightness, from -1 (all ink) to 0 (blank)"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        direction = 1 if self.sign == "more" else -1

        def ink(x: Tensor) -> Tensor:
            return direction * (x.flatten(1).mean(1) + 1) / 2

        return ink
