"""A profile along one direction: smooth steps and bumps, as plateaus and spikes of a landscape that is known."""

# Mutation tests: test_rewards_of_points.py

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.rewards import Reward
from tiltflow.settings import Settings


class Feature(Settings):
    """A step or a bump of a profile."""

    at: float
    """Where it is, along the direction."""
    height: float
    """How much it adds: negative where it takes away."""
    width: Annotated[float, Field(gt=0)]
    """A step climbs from 27 % to 73 % of its height within one width on either side; a bump has it as standard deviation."""


class Profile(Settings):
    """At the coordinate s of a sample: constant + sum over steps of height / (1 + exp(-(s - at) / width)) + sum over bumps of
    height exp(-(s - at)^2 / 2 width^2)."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "reward"

    name: Literal["profile"] = "profile"
    constant: float = 0.0
    """The level before all steps."""
    steps: tuple[Feature, ...] = ()
    """Smooth steps, {at: .., height: .., width: ..}."""
    bumps: tuple[Feature, ...] = ()
    """Gaussian bumps, {at: .., height: .., width: ..}."""
    direction: tuple[float, ...] | None = None
    """The direction of s, a list of one number for each coordinate; by default s is the first coordinate."""

    @model_validator(mode="after")
    def _not_flat(self) -> Profile:
        if not self.steps and not self.bumps:
            raise ValueError("steps and bumps: give one at least; the same reward for all samples teaches nothing")
        if self.direction is not None and not any(self.direction):
            raise ValueError("direction: must not be 0")
        return self

    @property
    def description(self) -> str:
        along = "the first coordinate" if self.direction is None else f"the direction {self.direction}"
        return f"a profile of {len(self.steps)} steps and {len(self.bumps)} bumps along {along}"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        def profile(x: Tensor) -> Tensor:
            s = self.along(x.flatten(1))
            value = torch.full_like(s, self.constant)
            for each in self.steps:
                value = value + each.height * torch.sigmoid((s - each.at) / each.width)
            for each in self.bumps:
                value = value + each.height * torch.exp(-(((s - each.at) / each.width) ** 2) / 2)
            return value

        return profile

    def along(self, points: Tensor) -> Tensor:
        """The coordinate s of points [batch, dimension]: [batch]."""
        if self.direction is None:
            return points[:, 0]
        if len(self.direction) != points.shape[1]:
            raise InputError(f"reward profile: direction has {len(self.direction)} numbers, and a sample {points.shape[1]}")
        unit = points.new_tensor(self.direction)
        s: Tensor = points @ (unit / unit.norm())
        return s
