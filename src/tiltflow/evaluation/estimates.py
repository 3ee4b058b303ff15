r"""Evaluation: how far samples are from the law they should follow, and how sure that number is.

Where the target law can be sampled, Wasserstein distances to it stand beside their Monte-Carlo floor: the same distance
between two exact samples of the same size. Where it cannot, base samples weighted by exp(r / beta) stand for it: that works
for any model and any reward as long as enough of the weight is shared: `ImportanceWeights.unknown` says where it is not.
"""

# Mutation tests: test_evaluation.py

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import ot
import torch
from torch import Tensor

from tiltflow import processes


def random_directions(dimension: int, generator: torch.Generator, count: int = 50) -> Tensor:
    """[count, dimension] unit vectors, uniform on the sphere, float64."""
    normal = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    unit: Tensor = normal / normal.norm(dim=1, keepdim=True)
    return unit


def sliced_w2(x: Tensor, y: Tensor, directions: Tensor) -> float:
    """Sliced 2-Wasserstein distance of two samples [n, d] and [m, d]: root mean square over the `directions` [count, d].

    In many dimensions a random direction hardly sees a difference in few of them: it shrinks by 1 / sqrt(d), and the floor does
    not. Measure such a difference in its own subspace."""
    a, b = x.double().cpu().numpy(), y.double().cpu().numpy()
    return float(ot.sliced_wasserstein_distance(a, b, projections=directions.double().T.numpy(), p=2))


def exact_w2(x: Tensor, y: Tensor) -> float:
    """2-Wasserstein distance of two samples [n, d] and [m, d], by linear programming: meant for a few thousand points."""
    cost = torch.cdist(x.double().cpu(), y.double().cpu()).square().numpy()
    return float(ot.emd2([], [], cost, numItermax=10_000_000) ** 0.5)


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"

    def named(self, name: str) -> dict[str, float]:
        """As two entries of a summary."""
        return {name: self.value, f"{name}_error": self.standard_error}


@dataclass(frozen=True)
class DistanceToLaw:
    """Mean distance of a sample to fresh exact samples, and the floor: the distance between two exact samples."""

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
    """Distance of x [n, d] to a law, averaged over `draws` samples exact(n, generator) of it.

    Args:
        directions: of the sliced distance, new ones for each of the draws, the same for its distance and its floor.
        distance: another one than the sliced.
    """
    samples = [exact(len(x), generator) for _ in range(draws + 1)]
    floors, distances = [], []
    for one, other in pairwise(samples):
        measure = distance or partial(sliced_w2, directions=random_directions(x.shape[1], directions))
        floors.append(measure(one, other))
        distances.append(measure(x, one))
    return DistanceToLaw(sum(distances) / draws, sum(floors) / draws, torch.tensor(floors).std().item())


FEW = 100
"""Effective samples below which the target law is not known: a standard error from fewer is too small far too often.
`test_evaluation.py` measures how often."""
FEW_IN_GROUP = 10
"""The same of each group: below it the bias of a self-normalised mean is too large to be corrected."""
TAIL = 0.5
"""Pareto k above which weights have no variance, and the standard error of a weighted mean no meaning. A tail is not looked at
while no sample has more than 1 / FEW of the weight: a reward of few values, whose weights jump, has none."""


@dataclass(frozen=True)
class ImportanceWeights:
    """Self-normalised weights of base samples toward p_base exp(tilt): `weights` [n] sum to one.

    Samples can come in `groups` of equal size, one after the other, each with a base law of its own: pictures of one prompt,
    samples of one class. The weights of each group then sum to 1 / groups, and what is estimated is the mean over the groups
    of what each target law has. A self-normalised mean of G samples is biased toward the base by O(1 / G), which does not go
    away with more groups, so over several groups it is corrected by the jackknife (Quenouille 1956).
    """

    weights: Tensor
    groups: int = 1
    strata: bool = False
    """Whether the groups are all that there are, as the classes of a model are, and not a sample of more, as prompts are. What
    differs between them is then no error."""

    @classmethod
    def from_rewards(cls, rewards: Tensor, beta: float) -> ImportanceWeights:
        """From the rewards [n] of base samples."""
        return cls.from_log_tilt(rewards.double() / beta)

    @classmethod
    def from_log_tilt(cls, log_tilt: Tensor, groups: int = 1, *, strata: bool = False) -> ImportanceWeights:
        """From the log weights [n], each up to a constant of its group. Raises ValueError if groups are not of equal size."""
        if len(log_tilt) % groups:
            raise ValueError(f"{len(log_tilt)} samples do not make {groups} groups of equal size")
        return cls(torch.softmax(log_tilt.double().reshape(groups, -1), 1).flatten() / groups, groups, strata and groups > 1)

    @property
    def in_groups(self) -> Tensor:
        """[groups, size], each row summing to one."""
        return self.weights.double().reshape(self.groups, -1) * self.groups

    @property
    def effective_sample_size(self) -> float:
        """1 / sum w^2 (Kong): the number of equally weighted samples that would tell as much."""
        return float(1 / self.weights.square().sum())

    @property
    def effective_group_size(self) -> float:
        """The same of a group: the harmonic mean over the groups."""
        return self.effective_sample_size / self.groups

    def unknown(self, group: str = "group") -> str | None:
        """Why the target law cannot be known from these weights, as a sentence, if it cannot.

        Args:
            group: what a group is, in a word.
        """
        n, size = len(self.weights), self.effective_sample_size
        if self.groups > 1 and self.effective_group_size < FEW_IN_GROUP:
            return (
                f"The {n // self.groups} base samples of a {group} weigh as much as {self.effective_group_size:.1f} of its"
                f" target law, fewer than {FEW_IN_GROUP}: what they say of it is pulled toward the base, by more than can be"
                " corrected."
            )
        if size < FEW:
            return (
                f"{n} base samples weigh as much as {size:.0f} of the target law, fewer than {FEW}: its numbers would be rough,"
                " and their standard errors too small."
            )
        largest = float(self.weights.max())
        if self.groups == 1 and largest > 1 / FEW and (k := pareto_tail(self.weights)) > TAIL:
            return (
                f"The largest weights of the {n} base samples fall off like a power law without a variance (Pareto k ="
                f" {k:.2f}, above {TAIL}), and one sample has {largest:.1%} of all the weight: the numbers of the target law"
                " would rest on a few samples, and their standard errors be too small."
            )
        return None

    def mean(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean of values [n, ...] over the samples, and its standard error, both [...].

        Of one group, and within each stratum: by the delta method. Of several others: over them. Where there are several, with
        a third of the jackknife's correction added in quadrature, which is what remains of a bias in the worst of the laws
        tried that `unknown` lets pass.
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
        """Of the plain weighted mean of values [n, ...], by the jackknife; [...]."""
        return self._raw(values).mean(0) - self.group_means(values).mean(0)

    def group_means(self, values: Tensor) -> Tensor:
        """The weighted mean of values [n, ...] in each group, less its bias of order 1 / size: [groups, ...]."""
        values, raw = values.double(), self._raw(values)
        w = self.in_groups.to(values.device).reshape(self.groups, -1, *(1 for _ in values.shape[1:]))
        size, each = w.shape[1], values.reshape(self.groups, -1, *values.shape[1:])
        # without sample i the mean is m - w_i (x_i - m) / (1 - w_i); one that holds all the weight says nothing of the rest
        shift = w * (each - raw[:, None]) / (1 - w).clamp(min=1e-12)
        return raw + (size - 1) / size * shift.sum(1)

    def _raw(self, values: Tensor) -> Tensor:
        values = values.double()
        w = self.in_groups.to(values.device).reshape(self.groups, -1, *(1 for _ in values.shape[1:]))
        return (w * values.reshape(self.groups, -1, *values.shape[1:])).sum(1)

    def divergence(self) -> Estimate:
        """KL(p* || p_base) in nats, E*[log w] - log E[w], and its standard error: the mean over the groups, as in `mean`."""
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
        """Distances that remain where nothing is wrong: between `count` samples of the target law, drawn from the weighted base
        samples, and base samples that are drawn again and keep their weights. [draws] for each distance.

        Args:
            distances: of signed masses on the base samples [draws, n], the first law's less the second's.
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
"""Draws at a time."""


def _counts(which: Tensor, size: int) -> Tensor:
    """How often each of `size` indices comes in which [groups, draws, n]: [groups, draws, size], float64."""
    zeros = torch.zeros(*which.shape[:2], size, dtype=torch.float64)
    return zeros.scatter_add_(2, which, torch.ones(which.shape, dtype=torch.float64))


def pareto_tail(weights: Tensor) -> float:
    """k of the generalised Pareto law of the largest weights, min(n / 5, 3 sqrt(n)) of them (1507.02646): moments from order
    1 / k on are infinite. 0 where these are all equal.

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


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of absolute differences of two histograms [classes]."""
    return float((p - q).abs().sum() / 2)


def histogram_masses(labels: Tensor, classes: int) -> Callable[[Tensor], Tensor]:
    """The total variation of signed masses [draws, n] on samples with these classes [n]; see `null_distances`."""
    members = one_hot(labels, classes)
    return lambda masses: (masses @ members).abs().sum(1) / 2


def reward_masses(rewards: Tensor) -> Callable[[Tensor], Tensor]:
    """The Kolmogorov-Smirnov distance of signed masses [draws, n] on samples with these rewards [n]."""
    values, order = rewards.double().sort()
    last = torch.cat([values.diff() > 0, torch.ones(1, dtype=torch.bool)])
    return lambda masses: masses[:, order].cumsum(1)[:, last].abs().amax(1)


def entropy(histogram: Tensor) -> float:
    """-sum p log p of a histogram [classes], in nats: log(classes) at most, 0 when only one class is left."""
    return float(torch.special.entr(histogram.double()).sum())


def total_variance(features: Tensor) -> float:
    """E|f - E f|^2 of features [n, d]: how much samples differ from each other."""
    return float(features.double().var(0, correction=0).sum())


def effective_number(kernel: Tensor) -> Tensor:
    """The Vendi score (2210.02410): exp of the entropy of the eigenvalues of K / n, for similarities K [n, n] with ones on the
    diagonal. 1 if all samples are the same, n if none is like another: the effective number of different ones."""
    eigenvalues: Tensor = torch.linalg.eigvalsh(kernel / len(kernel)).clamp(min=0)
    entropy_of_them: Tensor = torch.special.entr(eigenvalues).sum()
    return entropy_of_them.exp()


def histogram_distance(
    labels: Tensor,
    base_labels: Tensor,
    weights: ImportanceWeights,
    classes: int,
    generator: torch.Generator,
    *,
    resamples: int = 400,
) -> tuple[Estimate, Tensor, Tensor]:
    """Total variation between the class histogram of samples and that of the weighted base samples.

    Args:
        labels: classes of the tuned samples, [n], integers.
        base_labels: classes of the base samples, [m], with `weights` [m].
        resamples: bootstrap resamples of both sides. Their spread is the estimate's `standard_error`: how far the estimate
            moves from sample to sample, and no interval for the distance, which is biased upward by about its floor.

    Returns: (distance, histogram [classes] of the samples, target histogram [classes]).
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
    """Kolmogorov-Smirnov distance, in [0, 1], between the law of the reward over samples and over weighted base samples.

    The density ratio of the tilted law to the base is a function of the reward alone, so this sees a wrong tilt in any
    space. It does not see samples that left the base's law at equal reward.

    Args:
        rewards: of the tuned samples, [n].
        base_rewards: of the base samples, [m], with `weights` [m].
        resamples: bootstrap resamples of both sides; see `histogram_distance` for what their spread is.
    """
    distances = []
    for _ in range(resamples):
        a, b = (drawn_again(len(both), weights, generator) for both in (rewards, base_rewards))
        distances.append(kolmogorov_smirnov(rewards[a], base_rewards[b], weights.weights[b] / weights.weights[b].sum()))
    return Estimate(kolmogorov_smirnov(rewards, base_rewards, weights.weights), torch.tensor(distances).std().item())


@dataclass(frozen=True)
class DistanceOverGroups:
    """The Kolmogorov-Smirnov distance of the law of the reward to the weighted base's, over groups of samples: largest gap of
    the mean over groups of their distribution functions, those of the base less their bias (`ImportanceWeights.group_means`).

    Args:
        gaps: tuned less target in each group, at thresholds [groups, thresholds].
        bias: what was taken from the target's mean [thresholds].
    """

    gaps: Tensor
    bias: Tensor

    @classmethod
    def of(cls, rewards: Tensor, base_rewards: Tensor, weights: ImportanceWeights, thresholds: int = 256) -> DistanceOverGroups:
        """From the rewards of tuned samples [n] and of base samples [m], at so many of their values."""
        values = torch.cat([rewards, base_rewards]).double().sort().values
        at = values[torch.linspace(0, len(values) - 1, thresholds).round().long()].unique()
        below, base_below = ((each.double()[:, None] <= at).double() for each in (rewards, base_rewards))
        ours = below.reshape(weights.groups, -1, len(at)).mean(1)
        return cls(ours - weights.group_means(base_below), weights.bias(base_below))

    @property
    def value(self) -> float:
        return float(self.gaps.mean(0).abs().max())

    def spread(self, generator: torch.Generator, resamples: int = 200) -> float:
        """How far the distance moves from sample to sample of groups (bootstrap)."""
        which = torch.randint(len(self.gaps), (resamples, len(self.gaps)), generator=generator)
        return float(self.gaps[which].mean(1).abs().amax(1).std())

    def null(self, generator: torch.Generator, draws: int = 1000) -> Tensor:
        """The distance where the mean gap is zero: [draws]. By a multiplier bootstrap over groups, whose law at one threshold
        is Student's, as of a mean of few groups it must be; a third of the bias is added in quadrature, as in `mean`."""
        groups = len(self.gaps)
        residual = self.gaps - self.gaps.mean(0)
        gaps = torch.randn(draws, groups, generator=generator, dtype=torch.float64) @ residual
        squares = torch.randn(draws, groups - 1, generator=generator, dtype=torch.float64).square().sum(1)
        distance = gaps.abs().amax(1) / (groups * squares).sqrt()
        return (distance.square() + self.bias.abs().max() ** 2 / 9).sqrt().clamp(max=1)  # no distance is larger


def drawn_again(count: int, weights: ImportanceWeights, generator: torch.Generator) -> Tensor:
    """The indices of a bootstrap resample of samples [count]: of the samples, within each stratum if there are such; or, where
    there are several, of whole groups."""
    groups, size = weights.groups, count // weights.groups
    if groups == 1 or weights.strata:
        which = torch.randint(size, (groups, size), generator=generator)
        return (which + size * torch.arange(groups)[:, None]).flatten()
    which = torch.randint(groups, (groups,), generator=generator)
    return torch.arange(count).reshape(groups, -1)[which].flatten()


def kolmogorov_smirnov(x: Tensor, y: Tensor, y_weights: Tensor) -> float:
    """Largest difference between the distribution functions of x [n] and of y [m] weighted by y_weights [m] (sum 1)."""
    values, order = torch.cat([x, y]).double().sort()
    mass = torch.cat([torch.full((len(x),), 1 / len(x), dtype=torch.float64), -y_weights.double()])[order]
    # ties are one step: look only at the last of equal values
    last = torch.cat([values.diff() > 0, torch.ones(1, dtype=torch.bool)])
    return float(mass.cumsum(0)[last].abs().max())


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of Gaussian fits to features [n, d] and [m, d]."""
    means, covariances = (x.double().mean(0), y.double().mean(0)), (torch.cov(x.double().T), torch.cov(y.double().T))
    # the eigenvalues of C_x C_y are real and not negative: it is similar to a positive semi-definite matrix
    cross = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    return float((means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * cross)


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, size: int, device: str = "cpu") -> Tensor:
    """`function` over copies of x, by all processes and a batch at a time on `device`; the results on the CPU, without
    gradients."""
    found = [function(x[part].to(device, copy=True)).clone() for part in processes.shares(len(x), size)]
    return processes.gathered(found, len(x)).cpu()


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """[n] integers -> [n, classes], float64."""
    return torch.nn.functional.one_hot(labels, classes).double()


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of values [n] and its standard error."""
    return Estimate(values.double().mean().item(), (values.double().std() / len(values) ** 0.5).item())
