"""Evaluation: distances of samples whose distance is known, and errors that cover what they should."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiltflow.evaluation import (
    Estimate,
    ImportanceWeights,
    distance_to_law,
    entropy,
    exact_w2,
    frechet_distance,
    histogram_distance,
    kolmogorov_smirnov,
    mean_estimate,
    one_hot,
    random_directions,
    reward_distance,
    sliced_w2,
    total_variance,
    total_variation,
    total_variation_floor,
)
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")

MEAN, SCALE, TILT = 0.7, 0.5, 1.0


def quantiles(n: int) -> Tensor:
    """Points of a standard normal law at equal mass: averages over them are integrals."""
    return torch.special.ndtri((torch.arange(n) + 0.5) / n)


# ---- distances of samples ----


def test_exact_w2_of_a_translation_is_its_length(generator: torch.Generator) -> None:
    x = torch.randn(50, 3, generator=generator)
    shuffled = x[torch.randperm(50, generator=generator)]
    assert exact_w2(x, shuffled + torch.tensor([3.0, 0.0, -4.0])) == pytest.approx(5)
    assert exact_w2(x, shuffled) == pytest.approx(0, abs=1e-7)  # the root of a rounding of 1e-16


def test_exact_w2_of_a_stretch_is_its_mean_square(generator: torch.Generator) -> None:
    """A positive definite map is the gradient of a convex function, hence optimal (Brenier)."""
    x = torch.randn(40, 2, generator=generator)
    y = x @ torch.tensor([[2.0, 0.5], [0.5, 0.7]]) + 1
    assert exact_w2(x, y) == pytest.approx((x - y).square().sum(1).mean().sqrt().item())
    assert exact_w2(x, y.repeat(2, 1)) == pytest.approx(exact_w2(x, y))


def test_sliced_w2_in_one_dimension_is_exact() -> None:
    """From N(0, 1) to N(m, s^2): W2^2 = m^2 + (s - 1)^2, on points at equal mass with the variance that they have."""
    x = quantiles(500)[:, None]
    expected = math.sqrt(0.7**2 + 0.5**2 * x.square().mean())
    assert sliced_w2(x, 0.7 + 1.5 * x.flip(0), -torch.ones(1, 1)) == pytest.approx(expected)


def test_sliced_w2_of_a_translation_is_its_length_over_root_dimension(generator: torch.Generator) -> None:
    """Its square is the mean of (5 cos)^2 over directions: 25 / 2, of standard deviation 25 / sqrt(8)."""
    x, n = torch.randn(20, 2, generator=generator), 2000
    moved = x + torch.tensor([3.0, -4.0])
    squared = sliced_w2(x, moved, random_directions(2, generator, n)) ** 2
    assert abs(squared - 12.5) < 4 * 25 / math.sqrt(8 * n)
    for direction, length in (([0.6, -0.8], 5.0), ([0.8, 0.6], 0.0), ([0.0, 1.0], 4.0)):
        assert sliced_w2(x, moved, torch.tensor([direction])) == pytest.approx(length, abs=1e-12)


def test_directions_are_uniform_and_those_of_the_generator() -> None:
    """E u u^T = 1 / d; a component squared has variance 2 (d - 1) / (d^2 (d + 2))."""
    directions = random_directions(5, stream(0, "directions"), 4000)
    assert_close(directions.norm(dim=1), torch.ones(4000))
    squares = (directions.T @ directions / 4000 - torch.eye(5) / 5).abs()
    assert squares.max() < 4.5 * math.sqrt(2 * 4 / (25 * 7) / 4000)
    assert torch.equal(directions, random_directions(5, stream(0, "directions"), 4000))
    assert not torch.equal(directions[:50], random_directions(5, stream(1, "directions")))


def test_distance_to_law_averages_distances_and_floors() -> None:
    """The exact samples are 0, 1, 4, 9: floors 1, 3, 5; distances of 10 to the first three 10, 9, 6."""
    draws = iter([0.0, 1.0, 4.0, 9.0])

    def exact(count: int, generator: torch.Generator) -> Tensor:
        return torch.full((count, 1), next(draws))

    result = distance_to_law(
        torch.full((5, 1), 10.0), exact, torch.Generator(), directions=torch.Generator(), distance=exact_w2, draws=3
    )
    assert (result.distance, result.floor, result.floor_std) == pytest.approx((25 / 3, 3, 2))


def test_distance_of_an_exact_sample_is_the_floor(generator: torch.Generator) -> None:
    def exact(count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, 2, generator=generator)

    result = distance_to_law(exact(400, generator), exact, generator, directions=stream(0, "directions"))
    assert abs(result.distance - result.floor) < 4 * result.floor_std
    moved = distance_to_law(exact(400, generator) + 1, exact, generator, directions=stream(0, "directions"))
    assert moved.distance > moved.floor + 10 * moved.floor_std


def test_directions_are_new_for_each_draw_and_shared_with_its_floor() -> None:
    """Exact samples and x are points moved along the first axis: each distance is |move| |u_1|, with the u of its draw."""
    moves = iter([0.0, 1.0, 3.0])

    def exact(count: int, generator: torch.Generator) -> Tensor:
        return torch.zeros(count, 3) + next(moves) * torch.tensor([1.0, 0, 0])

    x, generator = torch.zeros(4, 3) + torch.tensor([7.0, 0, 0]), stream(3, "directions")
    result = distance_to_law(x, exact, torch.Generator(), directions=generator, draws=2)
    again = stream(3, "directions")
    first, second = (random_directions(3, again)[:, 0].square().mean().sqrt().item() for _ in range(2))
    assert first != second
    assert result.distance == pytest.approx((7 * first + 6 * second) / 2)
    assert result.floor == pytest.approx((1 * first + 2 * second) / 2)


def test_frechet_distance_of_a_scaled_and_moved_sample(generator: torch.Generator) -> None:
    """y = a x + b: |b + (a - 1) m|^2 + (a - 1)^2 tr C."""
    x = torch.randn(30, 3, generator=generator) @ torch.randn(3, 3, generator=generator) + 2
    b = torch.tensor([0.5, -1.0, 0.0])
    expected = (b + 0.5 * x.mean(0)).square().sum() + 0.25 * torch.cov(x.T).trace()
    assert frechet_distance(x, 1.5 * x + b) == pytest.approx(expected.item())


def test_frechet_distance_of_unlike_covariances(generator: torch.Generator) -> None:
    """tr (A B)^(1/2) is the trace of the root of the symmetric A^(1/2) B A^(1/2)."""
    x, y = (
        torch.randn(30, 3, generator=generator),
        torch.randn(20, 3, generator=generator) @ torch.randn(3, 3, generator=generator),
    )

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T

    a, b = torch.cov(x.T), torch.cov(y.T)
    expected = (x.mean(0) - y.mean(0)).square().sum() + (a + b - 2 * root(root(a) @ b @ root(a))).trace()
    assert frechet_distance(x, y) == pytest.approx(expected.item())


# ---- weights ----


def gaussian_weights(n: int) -> tuple[Tensor, ImportanceWeights]:
    """Points of N(0.7, 0.25) at equal mass, weighted by exp(x)."""
    x = MEAN + SCALE * quantiles(n)
    return x, ImportanceWeights.from_rewards(0.4 * TILT * x, 0.4)


def test_weights_are_exp_of_reward_over_beta() -> None:
    weights = ImportanceWeights.from_rewards(torch.tensor([0.0, 1.0, 2.0]), 0.5).weights
    assert_close(weights, torch.tensor([1, math.exp(2), math.exp(4)]) / (1 + math.exp(2) + math.exp(4)))


def test_effective_sample_size() -> None:
    """n for equal weights, 1 for one; n exp(-s^2 c^2) for a Gaussian under a linear tilt."""
    assert ImportanceWeights(torch.full((8,), 1 / 8)).effective_sample_size == pytest.approx(8)
    assert ImportanceWeights(torch.eye(8)[0]).effective_sample_size == 1
    _, weights = gaussian_weights(100_000)
    # E exp(2 c x) is a normal integral around z = 2 s c = 1; the points end at z = 4.4, 3e-4 of it lies beyond
    assert weights.effective_sample_size / 100_000 == pytest.approx(math.exp(-((SCALE * TILT) ** 2)), rel=1e-3)


def test_weighted_mean_and_its_error_are_those_of_the_tilt() -> None:
    """Mean m + s^2 c; error^2 = exp(s^2 c^2) s^2 (1 + s^2 c^2) / n."""
    x, weights = gaussian_weights(100_000)
    mean, error = weights.mean(torch.stack([x, 2 * x + 1], 1))
    spread = (SCALE * TILT) ** 2
    expected = math.exp(spread) * SCALE**2 * (1 + spread) / 100_000
    assert mean.tolist() == pytest.approx([0.95, 2.9], rel=1e-4)
    # as above, times (z - s c)^2: what lies beyond z = 4.4 is 3e-4 * 3.9^2 / 1.25 = 4e-3
    assert (error**2).tolist() == pytest.approx([expected, 4 * expected], rel=1e-2)
    assert weights.mean(x)[0].item() == pytest.approx(mean[0].item())


def test_weighted_mean_is_covered_by_its_error(generator: torch.Generator) -> None:
    """95 % of 400 intervals of 1.96 standard errors hold the truth, give or take 4 standard errors of that share."""
    truth, hits = MEAN + SCALE**2 * 0.8, 0
    for _ in range(400):
        x = MEAN + SCALE * torch.randn(500, generator=generator)
        mean, error = ImportanceWeights.from_rewards(0.8 * x, 1.0).mean(x)
        hits += int(abs(mean - truth) < 1.96 * error)
    assert hits / 400 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 400))


# ---- histograms ----


def test_total_variation_is_the_mass_that_must_move() -> None:
    assert total_variation(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.4, 0.5])) == pytest.approx(0.4)


def test_floor_of_one_sample_each_is_the_chance_that_they_differ(generator: torch.Generator) -> None:
    p, draws = torch.tensor([0.5, 0.3, 0.2]), 4000
    differ = 1 - p.square().sum().item()
    floor = total_variation_floor(p, 1, 0.2, generator, draws=draws)
    assert abs(floor - differ) < 4 * math.sqrt(differ * (1 - differ) / draws)


def test_floor_of_two_classes_is_that_of_a_normal_difference(generator: torch.Generator) -> None:
    """E |N(0, v)| = sqrt(2 v / pi) with v = p (1 - p) (1 / n + 1 / m)."""
    draws, std = 4000, math.sqrt(0.21 * (1 / 400 + 1 / 100))
    floor = total_variation_floor(torch.tensor([0.7, 0.3]), 400, 100.3, generator, draws=draws)
    # |N| has standard deviation 0.6; the normal approximation is off by a relative 1 / m at most
    assert abs(floor - math.sqrt(2 / math.pi) * std) < std * (4 * 0.6 / math.sqrt(draws) + 1 / 100)


def weighted_labels(n: int, share: float) -> Tensor:
    """[n] labels 0 and 1, with this share of ones."""
    return (torch.arange(n) < share * n).long()


def test_histogram_distance_of_known_histograms(generator: torch.Generator) -> None:
    labels, base_labels = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 2])
    weights = ImportanceWeights(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    distance, ours, target = histogram_distance(labels, base_labels, weights, 4, generator, resamples=2)
    assert ours.tolist() == [0.5, 0.25, 0.25, 0]
    assert_close(target, torch.tensor([0.1, 0.2, 0.7, 0]))
    assert distance.value == pytest.approx((0.4 + 0.05 + 0.45) / 2)


def known_error(weights: Tensor, base: Tensor, share: float, n: int) -> float:
    """Of the difference of a share of n and a weighted share, by the delta method."""
    target = weights @ base.double()
    return math.sqrt(share * (1 - share) / n + (weights * (base - target)).square().sum())


def uneven_weights(n: int, generator: torch.Generator) -> ImportanceWeights:
    return ImportanceWeights.from_rewards(torch.randn(n, generator=generator), 2.0)


def test_bootstrap_errors_are_those_of_the_delta_method(generator: torch.Generator) -> None:
    """With two classes, or two values of the reward, both distances are a difference of shares far from 0."""
    labels, base, resamples = weighted_labels(300, 0.8), weighted_labels(500, 0.3), 1000
    weights = uneven_weights(500, generator)
    expected = known_error(weights.weights, base, 0.8, 300)
    difference = 0.8 - (weights.weights @ base.double()).item()
    by_class, _, _ = histogram_distance(labels, base, weights, 2, generator, resamples=resamples)
    by_reward = reward_distance(labels.double(), base.double(), weights, generator, resamples=resamples)
    for estimate in (by_class, by_reward):
        assert estimate.value == pytest.approx(difference)
        # a standard deviation of n draws has relative error 1 / sqrt(2 n); the delta method is off by 1 / 300
        assert estimate.standard_error == pytest.approx(expected, rel=4 / math.sqrt(2 * resamples) + 1 / 300)


def test_kolmogorov_smirnov_is_the_largest_gap_of_the_distribution_functions(generator: torch.Generator) -> None:
    """Against every threshold, with ties within and between the samples."""
    x = torch.randint(6, (9,), generator=generator) / 2
    y = torch.randint(6, (7,), generator=generator) / 2 + 0.5
    weights = torch.rand(7, generator=generator)
    weights = weights / weights.sum()
    gaps = [abs((x <= c).double().mean() - weights[y <= c].sum()).item() for c in torch.linspace(-1, 5, 61)]
    assert kolmogorov_smirnov(x, y, weights) == pytest.approx(max(gaps))
    assert kolmogorov_smirnov(torch.zeros(3), torch.ones(2), torch.tensor([0.5, 0.5])) == pytest.approx(1)


# ---- small things ----


def test_one_hot() -> None:
    assert one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert one_hot(torch.tensor([0]), 2).dtype == torch.float64


def test_mean_estimate_is_the_mean_and_its_standard_error() -> None:
    estimate = mean_estimate(torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]))
    assert estimate.value == 4
    assert estimate.standard_error == pytest.approx(math.sqrt((9 + 4 + 1 + 0 + 36) / 4 / 5))


def test_estimate_reads_well() -> None:
    assert str(Estimate(0.123456, 0.00789)) == "0.1235 ± 0.0079"


def test_entropy_and_variance() -> None:
    assert entropy(torch.full((4,), 0.25)) == pytest.approx(math.log(4))
    assert entropy(torch.tensor([1.0, 0.0])) == 0
    assert entropy(torch.tensor([0.9, 0.1])) == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    # two points at distance 2 in the first coordinate, 4 in the second: 1 + 4 around their middle
    assert total_variance(torch.tensor([[0.0, 1.0], [2.0, 5.0]])) == pytest.approx(5)
