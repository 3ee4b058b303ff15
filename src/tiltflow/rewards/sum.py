"""The weighted sum of several rewards."""

# Mutation tests: test_rewards.py

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from tiltflow.flows.field import Which
from tiltflow.rewards import Metadata, NamedReward, Reward, Seen, select
from tiltflow.rewards.functions.checked import values_of
from tiltflow.rewards.functions.latents import decoded_from, seen_by
from tiltflow.rewards.functions.prompted import given
from tiltflow.settings import Settings


class Term(Settings):
    """One reward and its weight in the sum."""

    reward: NamedReward
    """Any of the rewards; `tiltflow settings` lists them."""
    weight: float = 1.0
    """Units of the sum per unit of this reward; below 0 for a penalty."""
    clip: tuple[float | None, float | None] = (None, None)
    """Limits that the reward is clipped to: beyond them there is nothing to gain, and no gradient."""

    def of(self, value: Tensor) -> Tensor:
        """The term of the sum for a value of the reward."""
        return self.weight * (value if self.clip == (None, None) else value.clamp(*self.clip))


class Sum(Settings):
    """weight_1 r_1(x) + weight_2 r_2(x) + ..., each clipped to its limits if it has any; differentiable if all its parts
    are."""

    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "weighted units"

    name: Literal["sum"] = "sum"
    rewards: tuple[Term, ...]
    """The terms, each with `reward` (a name, or a mapping with a name) and `weight`: at least one."""

    @field_validator("rewards")
    @classmethod
    def _some(cls, rewards: tuple[Term, ...]) -> tuple[Term, ...]:
        if not rewards:
            raise ValueError("needs at least one term, for example [{reward: ink, weight: 2}]")
        return rewards

    @property
    def description(self) -> str:
        return " + ".join(f"{term.weight:g} × ({term.reward.description})" for term in self.rewards)

    @property
    def differentiable(self) -> bool:
        return all(term.reward.differentiable for term in self.rewards)

    def build(self, device: torch.device | str = "cpu") -> Reward:
        return WeightedSum(tuple((term, term.reward.build(device)) for term in self.rewards))


@dataclass(frozen=True)
class WeightedSum:
    """sum_i weight_i clip(r_i)."""

    parts: tuple[tuple[Term, Reward], ...]

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> WeightedSum:
        """The sum for samples of these prompts."""
        return WeightedSum(tuple((term, given(part, prompts, metadata)) for term, part in self.parts))

    def select(self, which: Which) -> WeightedSum:
        """The sum for these samples of the batch."""
        return WeightedSum(tuple((term, select(part, which)) for term, part in self.parts))

    @property
    def sees(self) -> frozenset[Seen]:
        """What its terms look at."""
        return frozenset(seen for _, part in self.parts for seen in seen_by(part))

    def decoded_from(self, latents: Tensor) -> WeightedSum:
        """The sum for samples that are decoded from these latents."""
        return WeightedSum(tuple((term, decoded_from(part, latents)) for term, part in self.parts))

    def __call__(self, x: Tensor) -> Tensor:
        values = [term.of(values_of(part, x)) for term, part in self.parts]
        total = torch.stack(values).sum(0)
        # with one part constant to autograd, its gradient of the sum would be that of the other parts
        return total if all(value.requires_grad for value in values) else total.detach()
