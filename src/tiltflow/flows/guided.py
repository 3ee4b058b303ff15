"""Classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltflow.flows.field import VelocityField, Which, Wrapper


@dataclass(frozen=True)
class Guided(Wrapper):
    """v = v_negative + guidance_scale (v - v_negative); at guidance_scale 1 it is `flow` itself. It mixes velocities as it
    mixes predictions, so the scale of a prediction is that of `flow`.

    Args:
        flow: bound to the conditions.
        negative: the same field bound to the negative ones.
        keeps_norm: the mixture is scaled to the norm of `flow`, along the last axis of a state.
    """

    negative: VelocityField
    guidance_scale: float
    keeps_norm: bool = False

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.guide(x, t, self.flow(x, t))

    def guide(self, x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The guided velocity [batch, *event] at (x, t), where that of `flow` is v."""
        if self.guidance_scale == 1:
            return v
        mixed = torch.lerp(self.negative(x, t), v, self.guidance_scale)
        return mixed * (v.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True)) if self.keeps_norm else mixed

    def bind(self, condition: Any) -> Guided:
        """Bind both fields, each to its own part of a `condition` of a guided field."""
        flow, negative = self.flow.bind(condition["condition"]), self.negative.bind(condition["negative"])
        return replace(self, flow=flow, negative=negative)

    @property
    def condition(self) -> dict[str, Any]:
        return {"condition": self.flow.condition, "negative": self.negative.condition}

    def select(self, which: Which) -> Guided:
        return replace(self, flow=self.flow.select(which), negative=self.negative.select(which))


Guide = Callable[[VelocityField], Guided]
"""Guides a field, where samples are drawn with guidance and learned from without it."""
