"""What is sampled and tuned, of every kind: a velocity field on a state, with a way in and a way out.

The state of a sample is one tensor [*event]. Kinds differ in what the noise is, in what a state means (`decode`) and in what a
sample is asked for (`conditions`); samplers, adjoints and methods are the same for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from tiltflow.conditions.prompts import Prompt
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
        """The solver and the grid where nothing else is asked for."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def grid(self) -> Start:
        """Where training begins: the time of the noise end, or the model's own grid, continued to clean data."""
        ...

    @property
    def own_grid(self) -> Start:
        """Where sampling begins: `grid`, or the times of the model's own scheduler."""
        ...

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Of one state."""
        ...

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of what `decode` makes of one state."""
        ...

    @property
    def has_decoder(self) -> bool:
        """Whether a sample is another thing than a state."""
        ...

    @property
    def prompted(self) -> bool:
        """Whether samples are asked for by prompts, of which any number can be thought of."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of a class-conditional model; none of another."""
        ...

    @property
    def guidance_scale(self) -> float:
        """Of classifier-free guidance where nothing else is asked for; 1 is none."""
        ...

    def conditions(self, items: Sequence[Prompt]) -> tuple[Any, Any]:
        """The conditions of samples of these items and the negative ones, a row for each sample; None where there are none."""
        ...

    def noise(self, items: Sequence[Prompt], generator: torch.Generator, t: Tensor) -> Tensor:
        """Starting points [len(items), *event] on the linear path, at the first time t of a grid. An item may say its size."""
        ...

    def decode(self, x: Tensor, *, batch_size: int) -> Tensor:
        """The samples of states x [batch, *event]: what rewards and people see. Differentiable."""
        ...

    def draw(
        self,
        items: Sequence[Prompt],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        guidance_scale: float | None = None,
        batch_size: int = ...,
    ) -> Tensor:
        """A sample of each item, [len(items), *sample_shape], on the CPU. It depends on the seed, its number, its item and
        `batch_size` alone."""
        ...

    def trainable(
        self, adapter: Adapter | None = None, pattern: str | re.Pattern[str] = "", *, seed: int = 0
    ) -> tuple[Self, Self]:
        """(base, what is going to be trained): a copy of the network, of which the parameters whose names match are trained, or
        the network with a new adapter.

        Raises InputError for what cannot be trained.
        """
        ...

    def base(self) -> Self:
        """The model without what is trained, frozen: with its adapter off."""
        ...

    def in_precision(self, dtype: torch.dtype | None) -> Self:
        """The model with its network evaluated in this dtype; None is that of its weights."""
        ...

    def save(self, folder: str | Path, card: str = "") -> None:
        """Write what was tuned."""
        ...
