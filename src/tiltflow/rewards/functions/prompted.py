"""Rewards that depend on the prompts of the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.flows.field import Which
from tiltflow.pictures import Picture, batch_of, edited
from tiltflow.rewards import Metadata, PromptedReward, Reward, WithPrompts

Told = TypeVar("Told")


@dataclass(frozen=True)
class OfPrompts:
    """A reward of pictures that depends on their prompts, metadata or labels, or on the pictures that they are edits of.

    Args:
        score: score(images [batch, ..], **asked) -> [batch], `asked` being the arguments that it asks for.
        asks: which of these: `prompts`, a text for each picture; `metadata`, a mapping for each; `labels`, int64 [batch], the
            classes that a class-conditional model was asked for; `sources` [batch, 3, height, width], the pictures that were
            edited, in [-1, 1] and of the size of the images.
    """

    score: Callable[..., Tensor]
    asks: tuple[str, ...] = ("prompts",)
    prompts: tuple[str, ...] = ()
    metadata: tuple[Metadata, ...] = ()

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> OfPrompts:
        """The reward of pictures of these prompts, one for each."""
        return replace(self, prompts=tuple(prompts), metadata=tuple(metadata or ({} for _ in prompts)))

    def select(self, which: Which) -> OfPrompts:
        """The reward of these samples of the batch."""
        return self.given(chosen(self.prompts, which), chosen(self.metadata, which))

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.prompts) != len(x):
            raise InputError(
                f"the reward asks for {' and '.join(self.asks)}, and there are {len(self.prompts)} for {len(x)} samples"
                + ("" if self.prompts else ": this model has no prompts and no classes")
            )
        told: dict[str, Any] = {"prompts": self.prompts, "metadata": self.metadata}
        if "labels" in self.asks:
            if not all("label" in more for more in self.metadata):
                raise InputError(
                    "the reward asks for labels, which are those of a class-conditional model; this one has prompts"
                )
            told["labels"] = torch.tensor([more["label"] for more in self.metadata], device=x.device)
        if "sources" in self.asks:
            told["sources"] = batch_of(sources_of(self.metadata), *x.shape[-2:]).to(x)
        return self.score(x, **{name: told[name] for name in self.asks})


def sources_of(metadata: Sequence[Metadata]) -> list[Picture]:
    """The pictures that samples with this metadata are edits of. Raises InputError if they are no edits."""
    sources = [picture for more in metadata if (picture := edited(more)) is not None]
    if len(sources) < len(metadata):
        raise InputError("the reward asks for sources, the pictures that were edited; this model edits none")
    return sources


def chosen(told: Sequence[Told], which: Which) -> Sequence[Told]:
    """Select the prompts, or their metadata, of these samples."""
    return told[which] if isinstance(which, slice) else [told[i] for i in which.tolist() if told]


def given(reward: Reward, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> Reward:
    """Bind a reward to the prompts of samples, one for each; a reward that does not ask for them is returned as it is."""
    return reward.given(prompts, metadata) if isinstance(reward, PromptedReward) else reward


def prompts_of(reward: Reward) -> Sequence[str]:
    """The prompts that a reward is bound to, if any."""
    return reward.prompts if isinstance(reward, WithPrompts) else ()


def told(reward: Reward, items: Sequence[Item]) -> Reward:
    """The reward of samples of these items, one for each, if it asks what they are."""
    return given(reward, [item.text for item in items], [item.metadata for item in items])
