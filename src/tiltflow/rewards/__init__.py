"""Rewards, one file each: a class of settings named after the file, with `build()`. A new reward is a new file.

A reward takes x [batch, *event], images [batch, channels, height, width] in [-1, 1] for most, or videos [batch, frames,
channels, height, width], of which a score of pictures is the mean over the frames, and returns [batch]: one number for each
sample, higher is better, no sample looking at its neighbours. A plain function is a reward. Methods that need its gradient get
it from autograd. A reward may ask for the prompts of the samples, their metadata and the pictures that they are edits of, or,
in place of the samples, for the latents that they are decoded from; and it may learn, while a method trains, from the samples
that it is shown after each iteration, or from data and the model.

A reward is the user's code: it gets a copy of the samples, which it may write into, and what it returns is copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import BeforeValidator
from torch import Tensor, nn

from tiltflow.flows.field import VelocityField, Which
from tiltflow.plugins import part_of

Metadata = Mapping[str, Any]
"""The other columns of a prompt in its file, by name."""
NonFiniteRewards = Literal["error", "drop"]
"""Handling of samples whose reward is NaN or infinite: the run ends, or they are left out."""


class Reward(Protocol):
    """x [batch, *event] -> [batch]."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class RewardSettings(Protocol):
    """Settings of a reward. Some of what they say depends on the settings, so read it on an instance."""

    @property
    def name(self) -> str:
        """The name by which a recipe asks for it."""
        ...

    @property
    def description(self) -> str:
        """One line for the report: what is measured, its range and sign."""
        ...

    @property
    def unit(self) -> str:
        """The unit of the numbers."""
        ...

    @property
    def differentiable(self) -> bool:
        """True where autograd gives the gradient in the samples."""
        ...

    @property
    def learned(self) -> bool:
        """True where `build` gives a `LearnedReward`."""
        ...

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Load what the reward needs. Raises InputError if something cannot be loaded."""
        ...


if TYPE_CHECKING:
    NamedReward = RewardSettings
else:
    NamedReward = Annotated[Any, BeforeValidator(part_of("rewards"))]
"""The type of a setting that is a reward: its name, or a mapping with its name and settings."""


@runtime_checkable
class BoundReward(Protocol):
    """A reward that is bound to the samples of a batch: to the prompt or class of each."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def select(self, which: Which, /) -> Reward:
        """The reward of these samples of the batch."""
        ...


@runtime_checkable
class PromptedReward(Protocol):
    """A reward that depends on the prompts of the samples."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> Reward:
        """The reward of samples of these prompts, one for each."""
        ...


@runtime_checkable
class WithPrompts(Protocol):
    """A reward that is bound to prompts."""

    @property
    def prompts(self) -> Sequence[str]:
        """The prompts, one for each sample; none before it is bound."""
        ...


@runtime_checkable
class RemoteReward(Protocol):
    """A reward that is computed elsewhere, so that it can be waited for in a thread."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    @property
    def request_size(self) -> int:
        """How many samples are sent together."""
        ...


Seen = Literal["samples", "latents"]
SAMPLES, LATENTS = frozenset[Seen]({"samples"}), frozenset[Seen]({"latents"})


@runtime_checkable
class LatentReward(Protocol):
    """A reward that may look at the latents that samples are decoded from."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    @property
    def sees(self) -> frozenset[Seen]:
        """What it looks at: where that is latents alone, nothing has to be decoded."""
        ...

    def decoded_from(self, latents: Tensor, /) -> Reward:
        """The reward of samples that are decoded from these latents [batch, *event]."""
        ...


def select(reward: Reward, which: Which) -> Reward:
    """The reward of these samples of the batch; a reward that is not bound is the same for all."""
    return reward.select(which) if isinstance(reward, BoundReward) else reward


@runtime_checkable
class LearnedReward(Protocol):
    """A reward with a network that learns from samples."""

    network: nn.Module

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def learn(self, x: Tensor, field: VelocityField, generator: torch.Generator) -> dict[str, float]:
        """Learn from samples x [batch, *event] of the tuned model, or from the model itself. Returns what was measured:
        `reward_loss`, the loss before, and what else there is to say of this step.

        Args:
            field: the tuned model's, bound to the conditions of these samples.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes: all that changes while it learns."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Resume from a state."""
        ...
