"""Steering, one kind a file: better samples of a model as it is, without training, by choosing among them or pushing them.

A kind is a class of settings named after its file. It draws from a `tiltflow.steering.drawing.source.Source`, one condition
after another, and says which law its samples have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from pydantic import BeforeValidator
from torch import Tensor

from tiltflow.laws.law import Array, Law
from tiltflow.plugins import part_of
from tiltflow.steering.drawing.source import Source


@dataclass(frozen=True)
class SteeredLaw:
    """The law of the samples of a steering.

    Args:
        words: the law, in words.
        temperature: beta of the law p_base exp(r / beta), where that is what is aimed at; None where it is another.
        exact: the law on the line, of the law of the base and the reward; None where it is not known.
    """

    words: str
    temperature: float | None = None
    exact: Callable[[Law, Callable[[Array], Array]], Law] | None = None


@dataclass(frozen=True)
class Chosen:
    """Samples of one condition.

    Args:
        samples: [count, *sample_shape], on the CPU.
        rewards: [count], float64.
        candidates: how many samples or particles they were chosen from, or are.
        effective_sample_size: how many independent samples of the law that is aimed at the candidates are worth.
        log_normaliser: estimate of log E exp(r / beta) over the base; None where there is none.
    """

    samples: Tensor
    rewards: Tensor
    candidates: int
    effective_sample_size: float
    log_normaliser: float | None = None


@runtime_checkable
class Steering(Protocol):
    """Settings of a kind of steering."""

    @property
    def name(self) -> str:
        """The name by which it is asked for."""
        ...

    def law(self, num_samples: int) -> SteeredLaw:
        """The law of each of so many samples of a condition."""
        ...

    def check(self, source: Source) -> None:
        """Raise InputError, before anything is drawn, for a model or a reward that it cannot steer by."""
        ...

    def draw(self, source: Source, num_samples: int) -> Chosen:
        """Draw samples of a condition."""
        ...


if TYPE_CHECKING:
    NamedSteering = Steering
else:
    NamedSteering = Annotated[Any, BeforeValidator(part_of("steering"))]
"""The type of a setting that is a kind of steering: its name, or a mapping with its name and settings."""
