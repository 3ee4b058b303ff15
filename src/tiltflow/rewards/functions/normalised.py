"""Rewards in standard deviations of the base's, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tiltflow.flows.field import Which
from tiltflow.rewards import Metadata, Reward, Seen, select
from tiltflow.rewards.functions.checked import values_of
from tiltflow.rewards.functions.latents import decoded_from, seen_by
from tiltflow.rewards.functions.prompted import chosen, given


class Statistics(Protocol):
    """Prompts and their metadata -> (mean, standard deviation) of the base's rewards, both [len(prompts)] in float64, computed
    when first asked for, and kept."""

    def __call__(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None, /) -> tuple[Tensor, Tensor]: ...

    def state_dict(self) -> dict[str, Any]:
        """The statistics computed so far, for `load_state_dict`."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Resume from a state."""
        ...


@dataclass(frozen=True)
class PerPrompt:
    """(r - mean) / std, with the mean and the standard deviation of the base's rewards for the prompt: every prompt is tilted
    equally, however far apart its pictures are. It is a fixed reward, unlike one that is standardised in its batch.

    The statistics are part of a checkpoint: a resumed run neither draws nor counts their samples again.
    """

    reward: Reward
    statistics: Statistics
    prompts: tuple[str, ...] = ()
    mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    std: Tensor = field(default_factory=lambda: torch.zeros(0))

    def state_dict(self) -> dict[str, Any]:
        """The statistics computed so far, for `load_state_dict`."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.statistics.load_state_dict(state)

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> PerPrompt:
        """The reward of samples of these prompts. Computes their statistics now, as all processes must do that together."""
        mean, std = self.statistics(prompts, metadata)
        return replace(self, reward=given(self.reward, prompts, metadata), prompts=tuple(prompts), mean=mean, std=std)

    def select(self, which: Which) -> PerPrompt:
        """The reward of these samples of the batch."""
        prompts = tuple(chosen(self.prompts, which))
        which = which.cpu() if isinstance(which, Tensor) else which
        return replace(self, reward=select(self.reward, which), prompts=prompts, mean=self.mean[which], std=self.std[which])

    @property
    def sees(self) -> frozenset[Seen]:
        """What the reward looks at."""
        return seen_by(self.reward)

    def decoded_from(self, latents: Tensor) -> PerPrompt:
        """The reward of samples that are decoded from these latents."""
        return replace(self, reward=decoded_from(self.reward, latents))

    def __call__(self, x: Tensor) -> Tensor:
        values = values_of(self.reward, x)
        return (values - self.mean.to(values)) / self.std.to(values)
