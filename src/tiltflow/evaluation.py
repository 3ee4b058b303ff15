r"""Evaluation: how far samples are from the law they should follow, and how sure that number is.

Where the target law can be sampled, Wasserstein distances to it stand beside their Monte-Carlo floor: the same distance
between two exact samples of the same size. Where it cannot, base samples weighted by exp(r / beta) stand for it: that works
for any model and any reward as long as enough of the weight is shared (the effective sample size says so).
"""

# Mutation tests: test_evaluation.py

from __future__ import annotations

from collections.abc import Callable
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


@dataclass(frozen=True)
class ImportanceWeights:
    """Self-normalised weights of base samples toward p_base exp(r / beta): `weights` [n] sum to one."""

    weights: Tensor

    @classmethod
    def from_rewards(cls, rewards: Tensor, beta: float) -> ImportanceWeights:
        """From the rewards [n] of base samples."""
        return cls(torch.softmax(rewards.double() / beta, 0))

    @property
    def effective_sample_size(self) -> float:
        """1 / sum w^2 (Kong): the number of equally weighted samples that would tell as much."""
        return float(1 / self.weights.square().sum())

    def mean(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean of values [n, ...] over the samples, and its standard error by the delta method, both [...]."""
        w = self.weights.to(values.device).reshape(-1, *(1 for _ in values.shape[1:]))
        values = values.double()
        mean = (w * values).sum(0)
        return mean, (w * (values - mean)).square().sum(0).sqrt()


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of absolute differences of two histograms [classes]."""
    return float((p - q).abs().sum() / 2)


def total_variation_floor(
    target: Tensor, count: int, target_count: float, generator: torch.Generator, *, draws: int = 200
) -> float:
    """Mean total variation between two histograms drawn from `target` [classes]: of `count` samples, and of `target_count`
    (the effective sample size of the weights). What is left when there is nothing wrong but finite samples."""

    def draw(size: int) -> Tensor:
        labels = torch.multinomial(target, draws * size, replacement=True, generator=generator).reshape(draws, size)
        return torch.stack([(labels == i).double().mean(1) for i in range(len(target))], 1)

    return float((draw(count) - draw(max(round(target_count), 1))).abs().sum(1).mean() / 2)


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
        resamples: bootstrap resamples of both sides, for the standard error.

    Returns: (distance, histogram [classes] of the samples, target histogram [classes]).
    """
    ours = one_hot(labels, classes).mean(0)
    base = one_hot(base_labels, classes)
    target = weights.weights @ base

    distances = []
    for _ in range(resamples):
        a = torch.randint(len(labels), (len(labels),), generator=generator)
        b = torch.randint(len(base_labels), (len(base_labels),), generator=generator)
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
        resamples: bootstrap resamples of both sides, for the standard error.
    """
    distances = []
    for _ in range(resamples):
        a = torch.randint(len(rewards), (len(rewards),), generator=generator)
        b = torch.randint(len(base_rewards), (len(base_rewards),), generator=generator)
        distances.append(kolmogorov_smirnov(rewards[a], base_rewards[b], weights.weights[b] / weights.weights[b].sum()))
    return Estimate(kolmogorov_smirnov(rewards, base_rewards, weights.weights), torch.tensor(distances).std().item())


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
