"""Distances between two sets of samples, and between samples and the law that they should follow, with their floors.

If the target law can be sampled: Wasserstein distances, with the same distance between two exact samples of the same size as
the floor. If it cannot: distances of class histograms and of the law of the reward to base samples with importance weights.
"""

# Mutation tests: test_evaluation.py

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate, one_hot
from tiltflow.evaluation.importance_weights import ImportanceWeights


def random_directions(dimension: int, generator: torch.Generator, count: int = 50) -> Tensor:
    """Draw unit vectors [count, dimension], uniform on the sphere, float64."""
    normal = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    unit: Tensor = normal / normal.norm(dim=1, keepdim=True)
    return unit


def sliced_w2(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """Return the sliced 2-Wasserstein distance of samples [n, d] and [m, d]: root mean square over `directions` [count, d].

    A difference in a few of many dimensions shrinks by 1 / sqrt(d) in random directions, while the floor does not: measure such
    a difference in its own subspace.
    """
    a, b = (np.sort((directions.double() @ each.double().cpu().T).numpy()) for each in (x, y))
    if len(x) == len(y):  # the n-th smallest goes to the n-th smallest
        return float(np.sqrt(np.square(a - b).mean()))
    import ot  # slow to import

    return float(np.sqrt(ot.wasserstein_1d(a.T, b.T, p=2, require_sort=False).mean()))


def exact_w2(x: Tensor, y: Tensor) -> float:
    """Return the 2-Wasserstein distance of samples [n, d] and [m, d] by linear programming, for up to a few thousand points."""
    import ot

    cost = torch.cdist(x.double().cpu(), y.double().cpu()).square().numpy()
    return float(ot.emd2([], [], cost, numItermax=10_000_000) ** 0.5)


@dataclass(frozen=True)
class DistanceToLaw:
    """Mean distance of a sample to fresh exact samples, and its floor: the mean distance between two exact samples."""

    distance: float
    floor: float
    floor_std: float


def distance_to_law(
    x: Tensor,
    exact: Callable[[int, torch.Generator], Tensor],
    generator: torch.Generator,
    *,
    directions: torch.Generator,
    distance: Callable[[Tensor, Tensor], float] | None = None,
    draws: int = 10,
) -> DistanceToLaw:
    """Estimate the distance of x [n, d] to a law; see `distances_to_law`."""
    return distances_to_law([x], exact, generator, directions=directions, distance=distance, draws=draws)[0]


def distances_to_law(
    several: Sequence[Tensor],
    exact: Callable[[int, torch.Generator], Tensor],
    generator: torch.Generator,
    *,
    directions: torch.Generator,
    distance: Callable[[Tensor, Tensor], float] | None = None,
    draws: int = 10,
) -> list[DistanceToLaw]:
    """Estimate the distances of several samples [n, d], all of one size, to a law from `draws` samples exact(n, generator) of
    it: the same for all of them, so that what is compared differs in the samples alone.

    Args:
        directions: generator of the sliced distance's directions: new ones for each draw, shared by distance and floor.
        distance: (x, y) -> distance; sliced_w2 by default.
    """
    count, dimension = several[0].shape
    samples = [exact(count, generator) for _ in range(draws + 1)]
    floors, distances = [], []
    for one, other in pairwise(samples):
        along = random_directions(dimension, directions, 50 if dimension > 1 else 1)  # a line has one
        measure = distance or partial(sliced_w2, directions=along)
        floors.append(measure(one, other))
        distances.append([measure(x, one) for x in several])
    floor, floor_std = sum(floors) / draws, torch.tensor(floors).std().item()
    return [DistanceToLaw(sum(each) / draws, floor, floor_std) for each in zip(*distances, strict=True)]


def total_variation(p: Tensor, q: Tensor) -> float:
    """Return the total variation distance of two histograms [classes]: half the sum of absolute differences."""
    return float((p - q).abs().sum() / 2)


def histogram_masses(labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """Return the function from signed masses [draws, n], on samples with classes `labels` [n], to total variations [draws]."""
    members = one_hot(labels, classes)
    return lambda masses: (masses @ members).abs().sum(1) / 2


def reward_masses(rewards: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function from signed masses [draws, n], on samples with rewards [n], to Kolmogorov-Smirnov distances
    [draws]."""
    values, order = rewards.double().sort()
    last = torch.cat([values.diff() > 0, torch.ones(1, dtype=torch.bool)])
    return lambda masses: masses[:, order].cumsum(1)[:, last].abs().amax(1)


def histogram_distance(
    labels: Tensor,
    base_labels: Tensor,
    weights: ImportanceWeights,
    classes: int,
    generator: torch.Generator,
    *,
    resamples: int = 400,
) -> tuple[Estimate, Tensor, Tensor]:
    """Estimate the total variation distance between the class histograms of samples and of weighted base samples.

    Args:
        labels: classes of the tuned samples, [n], integers.
        base_labels: classes of the base samples, [m], with `weights` [m].
        resamples: number of bootstrap resamples of both sides. Their standard deviation is the estimate's `standard_error`: it
            describes how the estimate varies from sample to sample, and is no interval for the distance, as the estimate is
            biased upward by about its floor.

    Returns (distance, histogram [classes] of the samples, target histogram [classes]).
    """
    ours = one_hot(labels, classes).mean(0)
    base = one_hot(base_labels, classes)
    target = weights.weights @ base

    distances = []
    for _ in range(resamples):
        a, b = (drawn_again(len(both), weights, generator) for both in (labels, base_labels))
        w = weights.weights[b]
        distances.append(total_variation(one_hot(labels[a], classes).mean(0), (w @ base[b]) / w.sum()))
    return Estimate(total_variation(ours, target), torch.tensor(distances).std().item()), ours, target


def reward_distance(
    rewards: Tensor, base_rewards: Tensor, weights: ImportanceWeights, generator: torch.Generator, *, resamples: int = 200
) -> Estimate:
    """Estimate the Kolmogorov-Smirnov distance, in [0, 1], between the laws of the reward over samples and over weighted base
    samples.

    The density ratio of the tilted law to the base is a function of the reward alone, so the distance detects a wrong tilt in
    any space. It does not detect samples that left the base's law at equal reward.

    Args:
        rewards: of the tuned samples, [n].
        base_rewards: of the base samples, [m], with `weights` [m].
        resamples: number of bootstrap resamples of both sides; see `histogram_distance` for the standard error.
    """
    distances = []
    for _ in range(resamples):
        a, b = (drawn_again(len(both), weights, generator) for both in (rewards, base_rewards))
        distances.append(kolmogorov_smirnov(rewards[a], base_rewards[b], weights.weights[b] / weights.weights[b].sum()))
    return Estimate(kolmogorov_smirnov(rewards, base_rewards, weights.weights), torch.tensor(distances).std().item())


@dataclass(frozen=True)
class DistanceOverGroups:
    """Kolmogorov-Smirnov distance of the law of the reward to the weighted base's, over groups of samples: the largest gap
    between the means over groups of their distribution functions, those of the base corrected for their bias
    (`ImportanceWeights.group_means`).

    Args:
        gaps: tuned less target in each group, [groups, thresholds].
        bias: bias that was subtracted from the target's mean, [thresholds].
    """

    gaps: Tensor
    bias: Tensor

    @classmethod
    def of(cls, rewards: Tensor, base_rewards: Tensor, weights: ImportanceWeights, thresholds: int = 256) -> DistanceOverGroups:
        """Compute the gaps from the rewards of tuned samples [n] and of base samples [m], at up to `thresholds` of their
        values."""
        values = torch.cat([rewards, base_rewards]).double().sort().values
        at = values[torch.linspace(0, len(values) - 1, thresholds).round().long()].unique()
        below, base_below = ((each.double()[:, None] <= at).double() for each in (rewards, base_rewards))
        ours = below.reshape(weights.groups, -1, len(at)).mean(1)
        return cls(ours - weights.group_means(base_below), weights.bias(base_below))

    @property
    def value(self) -> float:
        """The distance, in [0, 1]."""
        return float(self.gaps.mean(0).abs().max())

    def spread(self, generator: torch.Generator, resamples: int = 200) -> float:
        """Return the standard deviation of the distance over bootstrap resamples of the groups."""
        which = torch.randint(len(self.gaps), (resamples, len(self.gaps)), generator=generator)
        return float(self.gaps[which].mean(1).abs().amax(1).std())

    def null(self, generator: torch.Generator, draws: int = 1000) -> Tensor:
        """Simulate distances [draws] under the null hypothesis of a zero mean gap.

        By a multiplier bootstrap over groups, scaled so that its law at one threshold is Student's t, as for a mean of few
        groups; a third of the bias is added in quadrature, as in `ImportanceWeights.mean`.
        """
        groups = len(self.gaps)
        residual = self.gaps - self.gaps.mean(0)
        gaps = torch.randn(draws, groups, generator=generator, dtype=torch.float64) @ residual
        squares = torch.randn(draws, groups - 1, generator=generator, dtype=torch.float64).square().sum(1)
        distance = gaps.abs().amax(1) / (groups * squares).sqrt()
        return (distance.square() + self.bias.abs().max() ** 2 / 9).sqrt().clamp(max=1)  # no distance is larger


def drawn_again(count: int, weights: ImportanceWeights, generator: torch.Generator) -> Tensor:
    """Draw the indices [count] of a bootstrap resample: of whole groups if there are several that are no strata, else of
    samples, within each stratum."""
    groups, size = weights.groups, count // weights.groups
    if groups == 1 or weights.strata:
        which = torch.randint(size, (groups, size), generator=generator)
        return (which + size * torch.arange(groups)[:, None]).flatten()
    which = torch.randint(groups, (groups,), generator=generator)
    return torch.arange(count).reshape(groups, -1)[which].flatten()


def kolmogorov_smirnov(x: Tensor, y: Tensor, y_weights: Tensor) -> float:
    """Return the largest difference between the distribution functions of x [n] and of y [m] with y_weights [m] of sum 1."""
    values, order = torch.cat([x, y]).double().sort()
    mass = torch.cat([torch.full((len(x),), 1 / len(x), dtype=torch.float64), -y_weights.double()])[order]
    # ties are one step: only the last of equal values counts
    last = torch.cat([values.diff() > 0, torch.ones(1, dtype=torch.bool)])
    return float(mass.cumsum(0)[last].abs().max())
