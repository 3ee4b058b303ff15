"""Rewards of latents: of what a model samples, before it is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tiltflow.flows.field import Which
from tiltflow.rewards import LATENTS, SAMPLES, LatentReward, Metadata, Reward, Seen, select
from tiltflow.rewards.functions.checked import values_of
from tiltflow.rewards.functions.prompted import given, prompts_of


@dataclass(frozen=True)
class OfLatents:
    """A reward of latents, as one of samples.

    Args:
        reward: of latents.
        latents: those of the samples that it is asked about; None where samples are latents, as those of a network without a
            decoder are.
    """

    sees: ClassVar[frozenset[Seen]] = LATENTS
    reward: Reward
    latents: Tensor | None = None

    @property
    def prompts(self) -> Sequence[str]:
        """The prompts of the samples, where the reward is bound to them."""
        return prompts_of(self.reward)

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> OfLatents:
        """The reward of samples of these prompts."""
        return replace(self, reward=given(self.reward, prompts, metadata))

    def select(self, which: Which) -> OfLatents:
        """The reward of these samples of the batch."""
        latents = None if self.latents is None else self.latents[which]
        return OfLatents(select(self.reward, which), latents)

    def decoded_from(self, latents: Tensor) -> OfLatents:
        """The reward of samples that are decoded from these latents [batch, *event]."""
        return replace(self, latents=latents)

    def __call__(self, x: Tensor) -> Tensor:
        return values_of(self.reward, x if self.latents is None else self.latents.to(x.device))


def seen_by(reward: Reward) -> frozenset[Seen]:
    """What a reward looks at: samples, the latents that they are decoded from, or both."""
    return reward.sees if isinstance(reward, LatentReward) else SAMPLES


def decoded_from(reward: Reward, latents: Tensor | None) -> Reward:
    """The reward of samples that are decoded from these latents [batch, *event], if it looks at them."""
    return reward.decoded_from(latents) if isinstance(reward, LatentReward) and latents is not None else reward
