"""Methods, one paper and one file each: a class of settings named after the file, with `gradients()`.

`gradients(batch, state)` is a generator: before each yield it adds the gradient of one optimizer step to the parameters of
`batch.tuned`, and it yields what it measured. A `tiltflow.training.batch.Batch` has all that an iteration needs; `state` is
made by `new_state` and kept from batch to batch. `target` is the law that the method aims at (`tiltflow.laws.target`), `needs`
what it needs of the reward and the model (`tiltflow.training.method`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Start
from tiltflow.settings import Settings
from tiltflow.training.method import Needs
from tiltflow.training.optimizer import Optimizer

Positive = Annotated[float, Field(gt=0)]


def from_preset(presets: Mapping[str, Mapping[str, Any]], values: Any) -> Any:
    """The values of a method's settings, where they name a `preset` on top of those of that preset."""
    return {**presets.get(str(values.get("preset")), {}), **values} if isinstance(values, dict) else values


class MethodSettings(Settings):
    """Part of the settings of every method."""

    @model_validator(mode="before")
    @classmethod
    def _optimizer_is_apart(cls, values: Any) -> Any:
        for key in Optimizer.model_fields:
            if isinstance(values, dict) and key in values and key not in cls.model_fields:
                raise ValueError(f"{key} is optimizer.{key} now")
        return values

    @property
    def needs(self) -> Needs:
        """Requirements on the reward and the model."""
        return Needs()

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """Settings of `tiltflow.Optimizer` that have other defaults with this method."""
        return {}

    def learns_nothing(self, group: int) -> str | None:
        """The reason why a batch with `group` samples of each condition (prompt, class, or none) teaches the model nothing;
        None if there is none."""
        return None

    @property
    def temperature(self) -> float | None:
        """The temperature that the method works at, in units of reward; None for a method without one."""
        return None

    def at_temperature(self, beta: float) -> Self:
        """The method with the settings that make it work at another temperature. Raises InputError for one without any."""
        raise InputError(f"{type(self).__name__} has no temperature with these settings")

    @abstractmethod
    def target(self, steps: int, start: Start = 0.0) -> Target:
        """The law that a run of so many optimizer steps aims at, sampled from time `start`."""


class Tempered(MethodSettings):
    """Part of the settings of every method that has a temperature for a setting."""

    beta: Positive = 1.0
    """Temperature of the tilt, in units of reward: small follows the reward, large stays with the base."""

    @property
    def temperature(self) -> float | None:
        """beta."""
        return self.beta

    def at_temperature(self, beta: float) -> Self:
        """The method with another beta."""
        return self.model_copy(update={"beta": beta})


class Tilting(Tempered):
    """Part of the settings of every method that aims at p_base(x) exp(r(x) / beta)."""

    beta: Positive = 1.0
    """Temperature of the tilt, in units of reward: small follows the reward, large stays with the base. It is the price of a
    nat of path KL."""

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """p_base(x) exp(r(x) / beta)."""
        return exponential_tilt(self.beta)

    def priced_chain(self, start: Start = 0.0) -> tuple[Chain, Tensor] | None:
        """The chain from time `start` whose control is optimised, and the price of a change of its velocities [K], in the units
        of `Chain.energy`, 0 for steps that are not controlled. None where there is no such chain."""
        return None
