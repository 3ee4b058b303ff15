"""The protocol of a method: what the training loop, and everything around it, asks of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

import torch
from pydantic import BeforeValidator

from tiltflow.laws.target import Target
from tiltflow.plugins import part_of
from tiltflow.samplers.grid import Start
from tiltflow.samplers.sampling import Sampling
from tiltflow.training.batch import Batch


@runtime_checkable
class Stateful(Protocol):
    """The state of a method between iterations, where that is part of a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Resume from a state."""
        ...


@dataclass(frozen=True)
class Needs:
    """Requirements of a method on the reward and the model, and how it uses a batch.

    Args:
        reward_gradient: whether the reward must be differentiable.
        learned_reward: whether the reward may learn while the method trains.
        critic_of_condition: the setting that needs a critic which knows the condition of a sample, where there is one; with it
            only one condition can be tuned.
        without_critic: what to use in its place.
        running_reward: whether the objective may have a running reward, `Batch.objective.running`.
        own_data: whether some samples come from data of the method's own, which have no conditions.
        begins_as_base: whether its law is counted from the base, so that the model must be the base before the first step.
        passes: optimizer steps on each batch.
        warmup_steps: optimizer steps at the start that leave the model as it is.
        exact_trajectories: the setting that needs trajectories without rounding, if there is one.
        trajectory_copies: tensors [steps, batch, *event] that are in memory at once, at most; one more where samples alone are
            guided.
        batches_kept: batches whose samples are in memory at once, the present one with them.
    """

    reward_gradient: bool = False
    learned_reward: bool = False
    critic_of_condition: str | None = None
    without_critic: str = ""
    running_reward: bool = False
    own_data: bool = False
    begins_as_base: bool = False
    passes: int = 1
    warmup_steps: int = 0
    exact_trajectories: str | None = None
    trajectory_copies: int = 1
    batches_kept: int = 1


@runtime_checkable
class Method(Protocol):
    """Settings of a method, with its algorithm; `tiltflow.methods.MethodSettings` has most of it."""

    @property
    def name(self) -> str:
        """The name by which a recipe asks for it."""
        ...

    @property
    def sampling(self) -> Sampling:
        """How samples are drawn while the method trains."""
        ...

    @property
    def needs(self) -> Needs:
        """Requirements on the reward and the model."""
        ...

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """Settings of `tiltflow.Optimizer` that have other defaults with this method."""
        ...

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """The law that a run of so many optimizer steps aims at, sampled from time `start`."""
        ...

    def learns_nothing(self, group: int, /) -> str | None:
        """Why a batch with `group` samples of each condition teaches the model nothing; None if it teaches it something."""
        ...

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device, /) -> Any:
        """The state that is kept between iterations. Raises InputError if the settings do not fit samples of this shape."""
        ...

    def gradients(self, batch: Batch, state: Any, /) -> Iterator[dict[str, float]]:
        """Before each yield, accumulate the gradient of one optimizer step in the parameters of `batch.tuned`; yield what was
        measured. Changes the state in place."""
        ...

    @property
    def temperature(self) -> float | None:
        """The temperature that the method works at, in units of reward: beta of the law that it aims at, exactly or to first
        order; None for a method without one."""
        ...

    def at_temperature(self, beta: float) -> Method:
        """The method with the settings that make it work at another temperature. It may change from batch to batch."""
        ...

    def model_copy(self, *, update: Mapping[str, Any]) -> Method:
        """A copy with some settings changed."""
        ...


def fewest_samples(method: Method) -> int:
    """The least number of samples of each condition, 2 or more, that teach the model something."""
    return next(group for group in count(2) if method.learns_nothing(group) is None)


if TYPE_CHECKING:
    NamedMethod = Method
else:
    NamedMethod = Annotated[Any, BeforeValidator(part_of("methods"))]
"""The type of a setting that is a method: its name, or a mapping with its name and settings."""
