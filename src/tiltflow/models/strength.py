"""The strength of a tilt: models between the base, at 0, and what was tuned, at 1, and beyond.

A heuristic: the law of such a model is not that of another temperature; docs/tilt-strength.md says what is known.
"""

# Mutation tests: test_strength.py

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.models.denoiser import Condition
from tiltflow.models.model import Model
from tiltflow.models.pipeline_adapter import AdaptedDenoiser, loaded_adapters
from tiltflow.models.text_to_image import TextToImage

M = TypeVar("M", Model, TextToImage)


class ScaledDenoiser(AdaptedDenoiser):
    """A denoiser whose new adapter is scaled while it is called: peft's `set_scale`, diffusers' `lora_scale`.

    Args:
        adapted: the denoiser, whose network this one shares.
        scale: factor of the adapter's output.
    """

    def __init__(self, adapted: AdaptedDenoiser, scale: float):
        super().__init__(adapted.network, adapted.predict, adapted.adapter, adapted.below)
        self.scale = scale

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        with self._scaled():
            return super().forward(x, time, condition)

    @contextmanager
    def _scaled(self) -> Iterator[None]:
        self._set(self.scale)
        try:
            yield
        finally:
            self._set(1.0)

    def _set(self, scale: float) -> None:
        for layer in self.layers:
            layer.set_scale(self.adapter, scale)


def at_strength(base: M, tuned: M, strength: float) -> M:
    """The model at a strength of its tilt: `base` itself at 0, `tuned` itself at 1. A LoRA of a pipeline is scaled; of all
    other networks the weights are base + strength (tuned - base), which for a LoRA that was merged into them is the same.

    Args:
        strength: 0 or more; beyond 1 it extrapolates.

    Raises InputError for a strength that is no such number, for a DoRA between 0 and 1 or beyond, and for models whose weights
    have no such mean.
    """
    strength = checked_strength(strength)
    if strength in (0.0, 1.0):
        return tuned if strength else base
    flow = tuned.flow
    assert isinstance(flow, Flow)  # AdapterOff is that of a base
    if isinstance(tuned, TextToImage) and isinstance(tuned.denoiser, AdaptedDenoiser):
        return replace(tuned, flow=replace(flow, network=_scaled(tuned.denoiser, strength)))
    first, last = base.flow.network, flow.network
    if not (isinstance(first, nn.Module) and isinstance(last, nn.Module)):
        raise InputError("tilt strength: the network must be a torch module")
    return replace(tuned, flow=replace(flow, network=interpolated(first, last, strength)))


def _scaled(adapted: AdaptedDenoiser, strength: float) -> ScaledDenoiser:
    """The denoiser with its adapter scaled. Raises InputError for a DoRA."""
    if loaded_adapters(adapted.network)[adapted.adapter].use_dora:
        raise InputError("tilt strength: a DoRA scales the weights of the base too, and so has only 0, the base, and 1")
    return ScaledDenoiser(adapted, strength)


def checked_strength(strength: Any) -> float:
    """Raise InputError for anything but a finite number of 0 or more."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
        raise InputError(f"tilt strength: must be a number of 0 (the base) or more, 1 is what was tuned; is {strength!r}")
    return float(strength)


@torch.no_grad()
def interpolated(base: nn.Module, tuned: nn.Module, strength: float) -> nn.Module:
    """A copy of `tuned` with weights base + strength (tuned - base); what is no float stays as tuned.

    Raises InputError if the networks have other tensors.
    """
    first, last = base.state_dict(), tuned.state_dict()
    if {key: value.shape for key, value in first.items()} != {key: value.shape for key, value in last.items()}:
        raise InputError("tilt strength: the tuned network has other weights than its base")
    mixed = {
        key: torch.lerp(first[key].to(value), value, strength) if value.is_floating_point() else value
        for key, value in last.items()
    }
    network = copy.deepcopy(tuned)
    network.load_state_dict(mixed)
    return network
