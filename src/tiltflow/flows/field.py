"""Velocity fields: what a sampler asks for, and the closed protocol of what models and methods hand around.

Time runs from noise, t = 0, to data, t = 1; a velocity is one on the linear path of `tiltflow.flows.interpolant`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

Which = Tensor | slice
"""Some samples of a batch: their indices [count], or a slice."""


class Velocity(Protocol):
    """(x [batch, *event], t [] or [batch]) -> velocity [batch, *event] on the linear path: all that a sampler asks for."""

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor: ...


class VelocityField(ABC):
    """A velocity that knows its network and the condition of each sample of a batch.

    The protocol is closed: a field is a `Flow`, a `Wrapper` around another field, or a `FunctionField`. So whatever is put
    around a flow, its samples can be selected, and what is measured in its predictions stays so.
    """

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity [batch, *event] at x [batch, *event] and t [] or [batch]."""

    @abstractmethod
    def bind(self, condition: Any) -> VelocityField:
        """The same field conditioned on `condition`: see `tiltflow.flows.flow.Flow`."""

    @property
    @abstractmethod
    def condition(self) -> Any:
        """What `bind` takes: the conditions that the field is bound to, as nested mappings of tensors."""

    @abstractmethod
    def select(self, which: Which) -> VelocityField:
        """The same field for these samples of the batch that it is bound to."""

    @abstractmethod
    def groups(self, count: int, device: torch.device) -> list[Tensor]:
        """The indices of those of `count` samples that share a condition, for each condition; see
        `tiltflow.flows.conditions.groups`."""

    @abstractmethod
    def name_of(self, which: int) -> str:
        """A name for the condition of this sample, the same in every batch: see `tiltflow.flows.conditions.name_of`."""

    @abstractmethod
    def prediction_scale(self, t: Tensor) -> Tensor:
        """Change of the network's prediction for a change of velocity by 1, at t [] or [batch]: of the shape of t."""

    def project(self, noise: Tensor) -> Tensor:
        """Standard normal noise [batch, *event] as that of this field, N(0, P): P is an orthogonal projection for each sample,
        such as on the atoms that a molecule has, and the identity by default."""
        return noise

    def own_weights(self) -> AbstractContextManager[None]:
        """The context in which the network has the weights of this field; a call enters it by itself. Nested entry is a
        no-op."""
        return nullcontext()


@dataclass(frozen=True)
class Wrapper(VelocityField):
    """A field around another one, and like it in all that it does not change."""

    flow: VelocityField

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        with self.own_weights():
            return self.flow(x, t)

    def bind(self, condition: Any) -> Self:
        return replace(self, flow=self.flow.bind(condition))

    @property
    def condition(self) -> Any:
        return self.flow.condition

    def select(self, which: Which) -> Self:
        return replace(self, flow=self.flow.select(which))

    def groups(self, count: int, device: torch.device) -> list[Tensor]:
        return self.flow.groups(count, device)

    def name_of(self, which: int) -> str:
        return self.flow.name_of(which)

    def prediction_scale(self, t: Tensor) -> Tensor:
        return self.flow.prediction_scale(t)

    def project(self, noise: Tensor) -> Tensor:
        return self.flow.project(noise)

    def own_weights(self) -> AbstractContextManager[None]:
        return self.flow.own_weights()


@dataclass(frozen=True)
class FunctionField(VelocityField):
    """A plain function of (x, t) as a field: the same for every sample, and its own prediction."""

    function: Velocity

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, t)

    def bind(self, condition: Any) -> Self:
        return self

    @property
    def condition(self) -> None:
        return None

    def select(self, which: Which) -> Self:
        return self

    def groups(self, count: int, device: torch.device) -> list[Tensor]:
        return [torch.arange(count, device=device)]

    def name_of(self, which: int) -> str:
        return ""

    def prediction_scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)
