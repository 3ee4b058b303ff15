"""First variations: the slope of a utility in the law, as a reward."""

# Mutation tests: test_utility_estimation.py

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from tiltflow.flows.field import Which
from tiltflow.rewards import Metadata, Reward, select
from tiltflow.rewards.functions.checked import values_of
from tiltflow.rewards.functions.prompted import given
from tiltflow.utilities.estimation.known import OfSamples

OfRewards = Callable[[Mapping[str, Tensor]], Tensor]
"""Values of rewards by name, each [batch] -> [batch]."""


@dataclass(frozen=True)
class FirstVariation:
    """A reward, the sum of functions of the samples and of one function of their rewards.

    Args:
        of_samples: weights, and functions x [batch, *event] -> [batch].
        of_rewards: of the values of rewards by name, each [batch] -> [batch].
        reward: those rewards.
        valued: False where its gradient alone is known; its value is then 0 wherever it is asked for.
    """

    of_samples: tuple[tuple[float, Reward], ...] = ()
    of_rewards: OfRewards | None = None
    reward: Mapping[str, Reward] = field(default_factory=dict)
    valued: bool = True

    @property
    def black_box(self) -> bool:
        """True where it takes the values of rewards alone, and no gradients: any method can use it."""
        return not self.of_samples

    def __call__(self, x: Tensor) -> Tensor:
        values = [weight * values_of(part, x) for weight, part in self.of_samples]
        if self.of_rewards is not None:
            values.append(self.of_rewards({name: values_of(each, x) for name, each in self.reward.items()}))
        total = torch.stack([each.to(values[0]) for each in values]).sum(0).to(x.dtype)
        # with one part constant to autograd, its gradient of the sum would be that of the other parts
        return total if all(each.requires_grad for each in values) else total.detach()

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> FirstVariation:
        """The same for samples of these prompts."""
        return self._with(lambda part: given(part, prompts, metadata))

    def select(self, which: Which) -> FirstVariation:
        """The same for these samples of the batch."""
        return self._with(lambda part: select(part, which))

    def _with(self, change: Callable[[Reward], Reward]) -> FirstVariation:
        parts = tuple((weight, change(part)) for weight, part in self.of_samples)
        return replace(self, of_samples=parts, reward={name: change(each) for name, each in self.reward.items()})

    def __mul__(self, weight: float) -> FirstVariation:
        own = self.of_rewards
        return replace(
            self,
            of_samples=tuple((weight * each, part) for each, part in self.of_samples),
            of_rewards=None if own is None else lambda values: weight * own(values),
        )

    def __add__(self, other: FirstVariation) -> FirstVariation:
        """The sum of two at the same law."""
        parts = [each for each in (self.of_rewards, other.of_rewards) if each is not None]
        return FirstVariation(
            self.of_samples + other.of_samples,
            (lambda values: torch.stack([part(values) for part in parts]).sum(0)) if parts else None,
            {**self.reward, **other.reward},
            self.valued and other.valued,
        )


@dataclass(frozen=True)
class Surrogate:
    """A function x -> [batch] whose gradient is given apart from its value, and is constant to autograd.

    Args:
        gradient: x -> [batch, *event].
        value: x -> [batch]; 0 where it is not known.
    """

    gradient: OfSamples
    value: OfSamples | None = None

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            value = x.new_zeros(len(x)) if self.value is None else self.value(x.detach()).to(x)
            if not x.requires_grad:
                return value
            slope = self.gradient(x.detach()).to(x)
        return value + ((x - x.detach()) * slope).flatten(1).sum(1)

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> Surrogate:
        """The same for samples of these prompts."""
        return self._with(lambda part: given(part, prompts, metadata))

    def select(self, which: Which) -> Surrogate:
        """The same for these samples of the batch."""
        return self._with(lambda part: select(part, which))

    def _with(self, change: Callable[[Any], Any]) -> Surrogate:
        return Surrogate(cast(OfSamples, change(self.gradient)), None if self.value is None else change(self.value))


def of_rewards(slope: Callable[..., Tensor], reward: Mapping[str, Reward], *names: str) -> FirstVariation:
    """slope(values of the rewards with these names)."""
    return FirstVariation(
        of_rewards=lambda values: slope(*(values[name] for name in names)),
        reward={name: reward[name] for name in names if name in reward},
    )


def of_samples(function: OfSamples, *, valued: bool = True) -> FirstVariation:
    """A function of the samples."""
    return FirstVariation(((1.0, function),), valued=valued)
