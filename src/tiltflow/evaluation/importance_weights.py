"""Importance weights of base samples toward the target law p_base exp(tilt), and where they are too uneven to say anything.

They stand for a target law that cannot be sampled: that works for any model and any reward as long as enough samples share the
weight; `ImportanceWeights.unknown` says where they do not.
"""

# Mutation tests: test_evaluation.py

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate

FEW = 100
"""Effective sample size below which the target law counts as unknown: standard errors from fewer samples are too small far too
often. `test_evaluation.py` measures how often."""
FEW_IN_GROUP = 10
"""The same for each group: below it, the bias of a self-normalised mean is too large to correct."""
TAIL = 0.5
"""Pareto k above which the weights have infinite variance, so that the standard error of a weighted mean is meaningless. The
tail is fitted only if one sample has more than 1 / FEW of the weight: the weights of a reward of few values have no tail."""


@dataclass(frozen=True)
class ImportanceWeights:
    """Self-normalised importance weights of base samples toward p_base exp(tilt).

    Samples can come in groups of equal size, one after the other, each with a base law of its own: pictures of one prompt,
    samples of one class. Estimates are then means over the groups. A self-normalised mean of G samples is biased toward the
    base by O(1 / G), which more groups do not reduce, so with several groups it is corrected by the jackknife
    (Quenouille 1956).

    Args:
        weights: [n], summing to 1, those of each group to 1 / groups.
        groups: number of groups.
        absent: why they say nothing, where the reward has no values.
    """

    weights: Tensor
    groups: int = 1
    strata: bool = False
    """True if the groups are all that exist, such as classes, and not a sample of more, such as prompts. Differences between
    groups then do not contribute to standard errors."""
    absent: str | None = None

    @classmethod
    def from_rewards(cls, rewards: Tensor, beta: float) -> ImportanceWeights:
        """Make weights exp(r / beta) of the rewards [n] of base samples."""
        return cls.from_log_tilt(rewards.double() / beta)

    @classmethod
    def from_log_tilt(cls, log_tilt: Tensor, groups: int = 1, *, strata: bool = False) -> ImportanceWeights:
        """Make weights of log weights [n], each up to a constant of its group. Raises ValueError if groups do not divide n."""
        if len(log_tilt) % groups:
            raise ValueError(f"{len(log_tilt)} samples do not make {groups} groups of equal size")
        return cls(torch.softmax(log_tilt.double().reshape(groups, -1), 1).flatten() / groups, groups, strata and groups > 1)

    @property
    def in_groups(self) -> Tensor:
        """Weights [groups, size], each row summing to one."""
        return self.weights.double().reshape(self.groups, -1) * self.groups

    @property
    def effective_sample_size(self) -> float:
        """1 / sum w^2 (Kong): the number of equally weighted samples with the same variance of a mean."""
        return float(1 / self.weights.square().sum())

    @property
    def effective_group_size(self) -> float:
        """Effective sample size of a group: harmonic mean over the groups."""
        return self.effective_sample_size / self.groups

    def unknown(self, group: str = "group") -> str | None:
        """Return a sentence that says why these weights do not determine the target law; None if they do.

        Args:
            group: word for a group, such as "prompt".
        """
        if self.absent is not None:
            return self.absent
        n, size = len(self.weights), self.effective_sample_size
        if self.groups > 1 and self.effective_group_size < FEW_IN_GROUP:
            return (
                f"The {n // self.groups} base samples of a {group} have an effective sample size of"
                f" {self.effective_group_size:.1f} under its target law, below {FEW_IN_GROUP}: estimates from them are"
                " biased toward the base by more than can be corrected."
            )
        if size < FEW:
            return (
                f"{n} base samples have an effective sample size of {size:.0f} under the target law, below {FEW}: estimates"
                " would be rough, and their standard errors too small."
            )
        largest = float(self.weights.max())
        if self.groups == 1 and largest > 1 / FEW and (k := pareto_tail(self.weights)) > TAIL:
            return (
                f"The largest weights of the {n} base samples follow a power law with infinite variance (Pareto k = {k:.2f},"
                f" above {TAIL}), and one sample has {largest:.1%} of all the weight: estimates for the target law would rest"
                " on a few samples, and their standard errors would be too small."
            )
        return None

    def mean(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted mean of values [n, ...] over the samples, and its standard error, both [...].

        The standard error is by the delta method for one group and within each stratum, and over the groups otherwise. With
        several groups, a third of the jackknife's correction is added in quadrature: the bias that remains in the worst of the
        laws tried that `unknown` accepts.
        """
        w = self.weights.to(values.device).reshape(-1, *(1 for _ in values.shape[1:]))
        values = values.double()
        mean = (w * values).sum(0)
        if self.groups == 1:
            return mean, (w * (values - mean)).square().sum(0).sqrt()
        corrected = self.group_means(values)
        variance = corrected.var(0)
        if self.strata:
            within = self.in_groups.to(values.device).reshape(self.groups, -1, *(1 for _ in values.shape[1:]))
            away = values.reshape(self.groups, -1, *values.shape[1:]) - corrected[:, None]
            variance = (within * away).square().sum(1).mean(0)
        error = (variance / self.groups + (corrected.mean(0) - mean).square() / 9).sqrt()
        return corrected.mean(0), error

    def bias(self, values: Tensor) -> Tensor:
        """Return the bias [...] of the plain weighted mean of values [n, ...], by the jackknife."""
        return self._raw(values).mean(0) - self.group_means(values).mean(0)

    def group_means(self, values: Tensor) -> Tensor:
        """Return the weighted means [groups, ...] of values [n, ...], less their bias of order 1 / size."""
        values, raw = values.double(), self._raw(values)
        w = self.in_groups.to(values.device).reshape(self.groups, -1, *(1 for _ in values.shape[1:]))
        size, each = w.shape[1], values.reshape(self.groups, -1, *values.shape[1:])
        # without sample i the mean is m - w_i (x_i - m) / (1 - w_i); clamped for a sample with all the weight
        shift = w * (each - raw[:, None]) / (1 - w).clamp(min=1e-12)
        return raw + (size - 1) / size * shift.sum(1)

    def _raw(self, values: Tensor) -> Tensor:
        values = values.double()
        w = self.in_groups.to(values.device).reshape(self.groups, -1, *(1 for _ in values.shape[1:]))
        return (w * values.reshape(self.groups, -1, *values.shape[1:])).sum(1)

    def divergence(self) -> Estimate:
        """Estimate KL(p* || p_base) in nats, E*[log w] - log E[w], with its standard error; means over the groups as in
        `mean`."""
        w = self.in_groups
        size = w.shape[1]
        terms = torch.special.xlogy(w, w * size)
        raw = terms.sum(1)
        within = (terms - w * (raw[:, None] + 1) + 1 / size).square().sum(1)
        if self.groups == 1:
            return Estimate(raw.item(), within.sqrt().item())
        rest = (1 - w).clamp(min=1e-12)
        without = (raw[:, None] - terms) / rest + torch.log((size - 1) / size / rest)
        corrected = size * raw - (size - 1) * without.mean(1)
        variance = within.mean() if self.strata else corrected.var()
        error = (variance / self.groups + (corrected.mean() - raw.mean()).square() / 9).sqrt()
        return Estimate(corrected.mean().item(), error.item())

    def null_distances(
        self,
        count: int,
        distances: Sequence[Callable[[Tensor], Tensor]],
        generator: torch.Generator,
        *,
        draws: int = 1000,
    ) -> list[Tensor]:
        """Simulate distances under the null hypothesis that the samples follow the target law; [draws] for each distance.

        Each draw compares `count` samples of the target law, drawn from the weighted base samples, with a bootstrap resample of
        the base samples with their weights.

        Args:
            distances: functions of signed masses [draws, n] on the base samples, the first law's less the second's.
        """
        w = self.in_groups.cpu()
        size, each = w.shape[1], count // self.groups
        found: list[list[Tensor]] = [[] for _ in distances]
        for _ in range(0, draws, PART):
            ours = torch.multinomial(w, PART * each, replacement=True, generator=generator).reshape(self.groups, PART, each)
            again = torch.randint(size, (self.groups, PART, size), generator=generator)
            theirs = _counts(again, size) * w[:, None]
            theirs = theirs / theirs.sum(2, keepdim=True).clamp(min=1e-300)
            masses = (_counts(ours, size) / each - theirs) / self.groups
            for values, distance in zip(found, distances, strict=True):
                values.append(distance(masses.transpose(0, 1).reshape(PART, -1)))
        return [torch.cat(values)[:draws] for values in found]


PART = 50
"""Number of draws that are computed at a time."""


def _counts(which: Tensor, size: int) -> Tensor:
    """Count each of `size` indices in which [groups, draws, n]: [groups, draws, size], float64."""
    zeros = torch.zeros(*which.shape[:2], size, dtype=torch.float64)
    return zeros.scatter_add_(2, which, torch.ones(which.shape, dtype=torch.float64))


def pareto_tail(weights: Tensor) -> float:
    """Estimate k of the generalised Pareto law of the largest min(n / 5, 3 sqrt(n)) weights (arXiv 1507.02646): moments of
    order 1 / k and higher are infinite. 0 if these weights are all equal.

    By the estimator of Zhang and Stephens (Technometrics 51, 2009): the mean of k over a profile posterior.
    """
    ordered = weights.detach().double().cpu().sort().values
    count = min(len(ordered) // 5, math.floor(3 * len(ordered) ** 0.5))
    excess = ordered[-count:] - ordered[-count - 1] if count else ordered[:0]
    quarter = excess[int(count / 4 + 0.5) - 1] if count else excess.sum()
    if not float(quarter) > 0:
        return 0.0
    grid = 20 + math.floor(count**0.5)
    steps = torch.arange(1, grid + 1, dtype=torch.float64) - 0.5
    rate = 1 / excess[-1] + (1 - (grid / steps).sqrt()) / (3 * quarter)
    log_likelihood = count * ((-rate / (k := torch.log1p(-rate[:, None] * excess).mean(1))).log() - k - 1)
    best = torch.softmax(log_likelihood, 0) @ rate
    return float(torch.log1p(-best * excess).mean())
