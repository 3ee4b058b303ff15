"""Methods, one paper and one file each: a class of settings named after the file, with `gradients()`.

`gradients(batch, state)` is a generator: at each yield it has added the gradient of one optimizer step to the parameters of
`batch.tuned`, and hands out what it measured. A `tiltflow.training.batch.Batch` has all that it needs for an iteration; `state`
is what `new_state` has made, kept from batch to batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Start
from tiltflow.settings import Settings
from tiltflow.training.method import Needs
from tiltflow.training.optimizer import Optimizer

Positive = Annotated[float, Field(gt=0)]


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
        """What the method needs of the reward and the model."""
        return Needs()

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The settings of `tiltflow.Optimizer` whose defaults are others with this method."""
        return {}

    def learns_nothing(self, group: int) -> str | None:
        """Why a batch with `group` samples of each condition (prompt, class, or none) teaches the model nothing; None if it
        teaches it something."""
        return None

    @abstractmethod
    def target(self, steps: int, start: Start = 0.0) -> Target:
        """The law that a run of so many optimizer steps aims at, sampled from time `start`."""

    # ---- by the names that runs/ asks for them ----

    @property
    def needs_reward_gradient(self) -> bool:
        return self.needs.reward_gradient

    @property
    def learns_reward(self) -> bool:
        return self.needs.learned_reward

    def log_tilt(self, rewards: Tensor, steps: int) -> Tensor:
        return self.target(steps).log_tilt(rewards)

    def target_law(self, steps: int) -> str:
        return self.target(steps).words

    def limits(self, start: Start = 0.0) -> list[str]:
        return [*self.target(1, start).caveats]


class Tilting(MethodSettings):
    """Part of the settings of every method that aims at p_base(x) exp(r(x) / beta)."""

    beta: Positive = 1.0
    """Temperature of the tilt, in units of reward: small follows the reward, large stays with the base. It is the price of a
    nat of path KL."""

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """p_base(x) exp(r(x) / beta)."""
        return exponential_tilt(self.beta)

    def priced_chain(self, start: Start = 0.0) -> tuple[Chain, Tensor] | None:
        """The chain from time `start` whose control is what is optimised, and the price of a change of its velocities, [K], as
        `Chain.energy` says it, 0 where a step is not controlled. None where there is no such chain."""
        return None
