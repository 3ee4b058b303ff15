"""What is known of the law at which a utility is taken: samples with weights, rewards, scores, a reference."""

# Mutation tests: test_utility_estimation.py

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.checked import values_of

OfSamples = Callable[[Tensor], Tensor]
"""x [batch, *event] -> a tensor of as many. It may be bound to prompts and labels as a reward is, by `given` and `select`."""
Need = Literal["score", "base_score", "log_ratio", "log_odds", "labels", "reference"]
WORDS: dict[Need, str] = {
    "score": "the score of the law",
    "base_score": "the score of the base",
    "log_ratio": "the log ratio of the law to the base",
    "log_odds": "the log densities of the conditional laws",
    "labels": "the condition of each sample",
    "reference": "samples of a reference law",
}


@dataclass(frozen=True)
class Known:
    """What is known of a law p.

    Args:
        x: samples [n, *event].
        weights: of the samples [n], up to a factor: importance weights, or those of strata; None where all are equal.
        reward: rewards by the names that the utility has for them, each x -> [batch].
        rewards: their values at the samples [n], by the same names; computed where they are missing.
        score: gradient of log p, [batch, *event]; `estimation.scores` makes it of a velocity field.
        base_score: the same of the base.
        log_ratio: log p(x) / p_base(x), [batch]; estimated by `evaluation.log_ratio`.
        log_odds: log p(x | condition) for each condition, up to a number that is the same for all: [batch, conditions].
        labels: int64 [n], the condition of each sample.
        reference: samples [m, *event] of the base, or of another law that is to be near or far.
        seed: for what a utility draws.

    Raises InputError for weights that are none.
    """

    x: Tensor
    weights: Tensor | None = None
    reward: Mapping[str, Reward] = field(default_factory=dict)
    rewards: Mapping[str, Tensor] = field(default_factory=dict)
    score: OfSamples | None = None
    base_score: OfSamples | None = None
    log_ratio: OfSamples | None = None
    log_odds: OfSamples | None = None
    labels: Tensor | None = None
    reference: Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.x) < 2:
            raise InputError(f"a utility of a law needs two samples or more, got {len(self.x)}")
        if self.weights is None:
            return
        if self.weights.shape != (len(self.x),):
            raise InputError(f"there must be a weight for each of {len(self.x)} samples, got {list(self.weights.shape)}")
        if not (self.weights.isfinite().all() and (self.weights >= 0).all() and self.weights.sum() > 0):
            raise InputError("weights of samples must be finite and not negative, and some above 0")

    def check(self, name: str, rewards: Sequence[str], needs: Sequence[Need]) -> None:
        """Raises InputError if what a utility of this name needs is not known."""
        for each in rewards:
            if each not in self.reward and each not in self.rewards:
                raise InputError(f"utility {name} needs a reward for {each!r}")
        for need in needs:
            if getattr(self, need) is None:
                raise InputError(f"utility {name} needs {WORDS[need]}, {need!r}")

    @cached_property
    def p(self) -> Tensor:
        """The probabilities of the samples: [n], float64."""
        if self.weights is None:
            return torch.full((len(self.x),), 1 / len(self.x), dtype=torch.float64, device=self.x.device)
        weights: Tensor = self.weights.double()
        return weights / weights.sum()

    def values(self, name: str) -> Tensor:
        """A reward at the samples: [n], float64."""
        if name not in self.rewards:
            with torch.no_grad():
                return values_of(self.reward[name], self.x).double()
        if self.rewards[name].shape != (len(self.x),):
            shape = list(self.rewards[name].shape)
            raise InputError(f"there must be a value of {name!r} for each of {len(self.x)} samples, got {shape}")
        return self.rewards[name].detach().double()

    def mean(self, values: Tensor) -> Tensor:
        """E_p of values [n, ..]."""
        mean: Tensor = torch.tensordot(self.p, values.detach().double(), 1)
        return mean

    def estimate(self, value: Tensor | float, influence: Tensor, others: float = 0.0) -> Estimate:
        """An estimate with the error that the delta method gives it, for the influence [n] of each sample on the value:
        sqrt(sum_i p_i^2 (influence_i - mean)^2), for independent samples with weights of their own. For strata, whose numbers
        are known, it is an upper bound. `others` is the variance that the samples of other laws add."""
        n = len(self.x)
        variance = float(self.p**2 @ (influence.detach().double() - self.mean(influence)) ** 2) * n / (n - 1)
        return Estimate(float(value), (variance + others) ** 0.5)


def spread_of_mean(values: Tensor) -> float:
    """The variance of the mean of values [m] of independent samples."""
    return float(values.double().var()) / len(values)
