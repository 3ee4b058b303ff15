"""The protocol of a model: a velocity field on states, with conditions and noise as input and `decode` as output.

A state is one tensor [*event]. Kinds of models differ in their noise (`noise`), in what a state stands for (`decode`) and in
their conditions (`conditions`); samplers, adjoints and methods are the same for all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.flows.adapter import AdapterOff
from tiltflow.flows.flow import Flow
from tiltflow.models.trainable import Adapter
from tiltflow.samplers.grid import Start
from tiltflow.samplers.sampling import Sampling


@runtime_checkable
class GenerativeModel(Protocol):
    """A model of `tiltflow.models`: a network on tensors (`Model`), or a pipeline of diffusers (`TextToImage`)."""

    @property
    def flow(self) -> Flow | AdapterOff:
        """The velocity field, bound to no condition."""
        ...

    @property
    def sampling(self) -> Sampling:
        """Default solver and number of steps."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def grid(self) -> Start:
        """Start of the grids of training: the time of the noise end, or the model's own grid, extended to clean data."""
        ...

    @property
    def own_grid(self) -> Start:
        """Start of the grids of sampling: `grid`, or the times of the model's own scheduler."""
        ...

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one state."""
        ...

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one decoded state."""
        ...

    @property
    def has_decoder(self) -> bool:
        """True if `decode` is not the identity."""
        ...

    @property
    def prompted(self) -> bool:
        """True if conditions are prompts, of which there is no complete list, unlike classes."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of a class-conditional model; empty for another."""
        ...

    @property
    def guidance_scale(self) -> float:
        """Default scale of classifier-free guidance; 1 is no guidance."""
        ...

    def conditions(self, items: Sequence[Item]) -> tuple[Any, Any]:
        """Return (conditions, negative conditions) of these items, one row per sample; None where there are none."""
        ...

    def noise(self, items: Sequence[Item], generator: torch.Generator, t: Tensor) -> Tensor:
        """Draw starting points [len(items), *event] on the linear path at the first time t of a grid. The law may depend on an
        item, for example on its size."""
        ...

    def decode(self, x: Tensor, *, batch_size: int) -> Tensor:
        """Decode states x [batch, *event] into samples [batch, *sample_shape], which rewards see. Differentiable."""
        ...

    def draw(
        self,
        items: Sequence[Item],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        guidance_scale: float | None = None,
        batch_size: int = ...,
    ) -> Tensor:
        """Draw one sample of each item, [len(items), *sample_shape], on the CPU. A sample depends only on the seed, its index,
        its item and `batch_size`."""
        ...

    def trainable(
        self, adapter: Adapter | None = None, pattern: str | re.Pattern[str] = "", *, seed: int = 0
    ) -> tuple[Self, Self]:
        """Return (base, model to train): a copy of the network in which the parameters whose names match `pattern` are trained,
        or the network with a new adapter.

        Raises InputError if nothing can be trained in this way.
        """
        ...

    def base(self) -> Self:
        """Return the frozen model that training starts from: with its adapter off."""
        ...

    def in_precision(self, dtype: torch.dtype | None) -> Self:
        """Return the model with its network evaluated in this dtype; None is the dtype of its weights."""
        ...

    def save(self, folder: str | Path, card: str = "") -> None:
        """Write what was tuned to a folder."""
        ...
