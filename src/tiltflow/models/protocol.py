"""What is sampled and tuned, of every kind: a velocity field on a state, with a way in and a way out.

The state of a sample is one tensor [*event]. Kinds differ in what the noise is, in what a state means (`decode`) and in what a
sample is asked for (`conditions`); samplers, adjoints and methods are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tiltflow.conditions.prompts import Prompt
from tiltflow.flows.adapter import AdapterOff
from tiltflow.flows.flow import Flow
from tiltflow.samplers.grid import Start
from tiltflow.samplers.sampling import Sampling


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
    def sample_shape(self) -> tuple[int, ...]:
        """Of what `decode` makes of one state."""
        ...

    def conditions(self, items: Sequence[Prompt]) -> tuple[Any, Any]:
        """The conditions of samples of these items and the negative ones, a row for each sample; None where there are none."""
        ...

    def start(self, num_samples: int, generator: torch.Generator, t: Tensor) -> Tensor:
        """Noise [num_samples, *event] on the linear path, at the first time t of a grid."""
        ...

    def decode(self, x: Tensor, *, batch_size: int) -> Tensor:
        """The samples of states x [batch, *event]: what rewards and people see. Differentiable."""
        ...
