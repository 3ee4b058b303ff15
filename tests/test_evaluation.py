"""Evaluation: distances of samples whose distance is known, and errors that cover what they should."""

from __future__ import annotations

import math
from collections.abc import Callable

import ot
import pytest
import torch
from scipy.stats import genpareto, t
from torch import Tensor
from torch.testing import assert_close

from tiltflow.evaluation.distances import (
    DistanceOverGroups,
    distance_to_law,
    drawn_again,
    exact_w2,
    histogram_distance,
    histogram_masses,
    kolmogorov_smirnov,
    random_directions,
    reward_distance,
    reward_masses,
    sliced_w2,
    total_variation,
)
from tiltflow.evaluation.estimates import Estimate, entropy, mean_estimate, one_hot, total_variance
from tiltflow.evaluation.features import frechet_distance
from tiltflow.evaluation.importance_weights import ImportanceWeights, pareto_tail
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


def test_sliced_w2_is_that_of_samples_as_often_as_they_are(generator: torch.Generator) -> None:
    """Of one size, where the sorted ones belong together, and of two, where parts of them do."""
    x, y = torch.randn(60, 3, generator=generator), 2 * torch.randn(20, 3, generator=generator) + 1
    directions = random_directions(3, generator, 7)
    same = sliced_w2(x, y.repeat(3, 1), directions)
    assert same == pytest.approx(sliced_w2(x, y, directions), rel=1e-12)
    a, b = x.double().numpy(), y.repeat(3, 1).double().numpy()
    assert same == pytest.approx(ot.sliced_wasserstein_distance(a, b, projections=directions.T.numpy(), p=2), rel=1e-12)


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


# ---- weights in groups ----


def left_out(log_tilt: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """The jackknife by its definition, G m - (G - 1) times the mean of what each G - 1 of the samples say; of log_tilt [G]."""
    size = len(log_tilt)
    without = [of(torch.cat([torch.arange(i), torch.arange(i + 1, size)])) for i in range(size)]
    return size * of(torch.arange(size)) - (size - 1) * torch.stack(without).mean(0)


def test_means_in_groups_are_those_of_the_jackknife_by_definition(generator: torch.Generator) -> None:
    groups, size = 5, 7
    tilt, values = torch.randn(groups, size, generator=generator), torch.randn(groups, size, 2, generator=generator)
    weights = ImportanceWeights.from_log_tilt(tilt.flatten() + torch.arange(groups).repeat_interleave(size), groups)
    expected = torch.stack(
        [left_out(tilt[c], lambda i, c=c: torch.softmax(tilt[c, i], 0) @ values[c, i]) for c in range(groups)]  # type: ignore[misc]
    )
    assert_close(weights.group_means(values.flatten(0, 1)), expected)
    mean, error = weights.mean(values.flatten(0, 1))
    assert_close(mean, expected.mean(0))
    plain = torch.einsum("cg,cgk->k", torch.softmax(tilt, 1), values) / groups
    assert_close(weights.bias(values.flatten(0, 1)), plain - mean)
    assert_close(error, (expected.std(0).square() / groups + ((plain - mean) / 3).square()).sqrt())

    def divergence(c: int) -> Callable[[Tensor], Tensor]:
        return lambda i: (w := torch.softmax(tilt[c, i], 0)) @ (w * len(i)).log()

    by_group = torch.stack([left_out(tilt[c], divergence(c)) for c in range(groups)])
    assert weights.divergence().value == pytest.approx(by_group.mean().item())


EXACT_TARGET = 1.0
SAID_WITHOUT_CORRECTION = {4: 0.589, 8: 0.765, 16: 0.869, 64: 0.962}
"""Of a self-normalised mean of r ~ N(0, 1) tilted by one standard deviation, from so many samples of each group."""


@pytest.mark.parametrize("size", SAID_WITHOUT_CORRECTION)
def test_the_bias_of_small_groups_is_seen_and_declared(size: int, generator: torch.Generator) -> None:
    """More groups do not remove it; the jackknife says how large it is, and below ten effective samples in a group the target
    counts as unknown."""
    groups = 100_000 // size
    r = torch.randn(groups * size, generator=generator)
    weights = ImportanceWeights.from_log_tilt(r, groups)
    mean, error = weights.mean(r)
    bias = weights.bias(r)
    assert (mean + bias).item() == pytest.approx(SAID_WITHOUT_CORRECTION[size], abs=0.03)
    assert bias < -(EXACT_TARGET - SAID_WITHOUT_CORRECTION[size]) / 2
    assert (weights.unknown("prompt") is None) == (size == 64)
    if size == 64:
        assert abs(mean - EXACT_TARGET) < 2 * error
    else:
        assert "of a prompt have an effective sample size of" in str(weights.unknown("prompt"))


LAWS: dict[str, tuple[Callable[[tuple[int, ...], torch.Generator], Tensor], float, float]] = {
    "normal": (lambda shape, g: torch.randn(shape, generator=g), 1.0, 1.0),
    "weak": (lambda shape, g: torch.randn(shape, generator=g), 0.5, 0.5),
    # a reward of 0 or 1, and one with a lower bound, tilted by e^1.5 and by e^3
    "binary": (lambda shape, g: (torch.rand(shape, generator=g) < 0.2).double(), 1.5, 1 / (1 + 4 * math.exp(-1.5))),
    "bounded": (lambda shape, g: torch.rand(shape, generator=g).log(), 3.0, -0.25),
}


@pytest.mark.parametrize(("law", "groups"), [(law, groups) for law in LAWS for groups in (4, 20, 200)])
def test_a_target_of_groups_that_is_known_is_covered_by_its_error(law: str, groups: int, generator: torch.Generator) -> None:
    """At 32 samples a group, 95 % of intervals by Student's law, four standard errors allowed, and a fiftieth for what is left
    of the bias."""
    draw, tilt, truth = LAWS[law]
    repeats, hits, known = 300, 0, 0
    for _ in range(repeats):
        r = draw((groups * 32,), generator)
        weights = ImportanceWeights.from_log_tilt(tilt * r, groups)
        if weights.unknown() is not None:
            continue
        known += 1
        mean, error = weights.mean(r)
        hits += int(abs(mean - truth) < t.ppf(0.975, groups - 1) * error)
    assert known > 0.8 * repeats or groups == 4
    assert known == 0 or hits / known > 0.95 - 0.02 - 4 * math.sqrt(0.95 * 0.05 / known)


def test_correcting_the_bias_pays(generator: torch.Generator) -> None:
    """Its price is variance: from 16 groups on the mean square error is lower with it."""
    errors = []
    for _ in range(300):
        r = torch.randn(16 * 32, generator=generator)
        weights = ImportanceWeights.from_log_tilt(r, 16)
        mean = weights.mean(r)[0]
        errors.append([(mean - 1).square().item(), (mean + weights.bias(r) - 1).square().item()])
    corrected, plain = torch.tensor(errors).mean(0)
    assert corrected < plain


# ---- where the target is not known ----


def test_what_differs_between_strata_is_no_error(generator: torch.Generator) -> None:
    """Three laws N(m, 1) far apart, each tilted by exp(x / 2): N(m + 1/2, 1). The mean over them is 1/2, the divergence 1/8;
    their z-scores are standard normal, though the means differ by ten."""
    centres, z = torch.tensor([-10.0, 0.0, 10.0], dtype=torch.float64), torch.zeros(400, 2)
    for i in range(len(z)):
        x = centres[:, None] + torch.randn(3, 300, generator=generator, dtype=torch.float64)
        weights = ImportanceWeights.from_log_tilt(x.flatten() / 2, 3, strata=True)
        mean, error = weights.mean(x.flatten())
        divergence = weights.divergence()
        z[i] = torch.tensor([(mean - 0.5) / error, (divergence.value - 1 / 8) / divergence.standard_error])
    assert (z.mean(0).abs() < 4 / len(z) ** 0.5).all()
    assert ((z.std(0) - 1).abs() < 0.15).all()
    assert not ImportanceWeights.from_log_tilt(x.flatten(), 1, strata=True).strata  # one group is no stratum


def test_resamples_of_strata_stay_in_them(generator: torch.Generator) -> None:
    strata = ImportanceWeights.from_log_tilt(torch.zeros(12), 3, strata=True)
    for _ in range(20):
        which = drawn_again(6, strata, generator)
        assert (which // 2).tolist() == [0, 0, 1, 1, 2, 2]
    of_groups = drawn_again(6, ImportanceWeights.from_log_tilt(torch.zeros(12), 3), generator)
    assert of_groups.reshape(3, 2).diff(dim=1).tolist() == [[1]] * 3


@pytest.mark.parametrize("k", [-0.3, 0.3, 0.7, 1.0])
def test_the_tail_of_exact_pareto_samples(k: float, generator: torch.Generator) -> None:
    """By inversion of the distribution function, 1 - (1 + k x)^(-1 / k); and beside the maximum likelihood of scipy."""
    x = (torch.rand(40, 2000, generator=generator) ** -k - 1) / k
    found = torch.tensor([pareto_tail(row) for row in x])
    # a shape from m = 3 sqrt(n) points has standard error (1 + k) / sqrt(m); its bias is of the order 1 / m
    m = math.floor(3 * math.sqrt(2000))
    assert abs(found.mean() - k) < 4 * (1 + abs(k)) / math.sqrt(m * 40) + 2 / m
    ordered = x[0].sort().values
    other = genpareto.fit((ordered[-m:] - ordered[-m - 1]).numpy(), floc=0)[0]
    assert found[0].item() == pytest.approx(other, abs=0.05)


def test_weights_that_are_cut_off_have_no_tail() -> None:
    assert pareto_tail(torch.ones(500)) == 0
    assert pareto_tail(torch.cat([torch.ones(500), 2 * torch.ones(500)])) == 0
    assert pareto_tail(torch.ones(1)) == 0


Law = Callable[[int, torch.Generator], Tensor]


def normal(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, generator=generator)


def exponential(count: int, generator: torch.Generator) -> Tensor:
    """Its tilts have weights of Pareto's law, k = tilt."""
    return -torch.rand(count, generator=generator).log()


def claims(law: Law, tilt: float, truth: float, count: int, generator: torch.Generator) -> tuple[float, float, float]:
    """How often the target is called known from `count` samples of the reward, and in how many of all runs it is so though it
    lies outside one and two standard errors."""
    known, outside, repeats = 0, [0, 0], 250
    for _ in range(repeats):
        r = law(count, generator)
        weights = ImportanceWeights.from_rewards(r, 1 / tilt)
        if weights.unknown() is None:
            mean, error = weights.mean(r)
            known += 1
            outside = [n + int(abs(mean - truth) > k * error) for n, k in zip(outside, (1, 2), strict=True)]
    return known / repeats, outside[0] / repeats, outside[1] / repeats


@pytest.mark.parametrize(("tilt", "count"), [(0.7, 500), (1.0, 1024), (1.0, 4096)])
def test_a_target_within_reach_is_known_and_covered(tilt: float, count: int, generator: torch.Generator) -> None:
    known, beyond_one, beyond_two = claims(normal, tilt, tilt, count, generator)
    assert known > 0.9
    assert beyond_one < 0.32 + 0.05 + 4 * math.sqrt(0.32 * 0.68 / 250)
    assert beyond_two < 0.05 + 0.02 + 4 * math.sqrt(0.05 * 0.95 / 250)


@pytest.mark.parametrize(
    ("law", "tilt", "truth", "count"),
    [
        (normal, 1.5, 1.5, 500), (normal, 1.75, 1.75, 1024), (normal, 2.0, 2.0, 2048), (normal, 2.34, 2.34, 4096),
        (exponential, 0.7, 1 / 0.3, 1024), (exponential, 0.7, 1 / 0.3, 4096),
    ],
)  # fmt: skip
def test_a_target_out_of_reach_is_seldom_called_known(
    law: Law, tilt: float, truth: float, count: int, generator: torch.Generator
) -> None:
    """Of the normal ones the median of what is said of the effective sample size is 70 to 90, the truth 52 to 16; at 30 nearly
    all would pass, and two standard errors hold the truth in .67 to .87 of them. Those that pass are the lucky ones, whose
    errors are the smallest: by the effective sample size alone up to a fifth of all runs would say something false, and half of
    those whose weights are of Pareto's law."""
    known, _, beyond_two = claims(law, tilt, truth, count, generator)
    assert known < 0.35
    assert beyond_two < 0.18


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_a_class_that_few_base_samples_have_leaves_a_target_known(share: float, generator: torch.Generator) -> None:
    """Its samples have 18 times the weight of the others, all alike: a jump is no tail."""
    seen = [
        ImportanceWeights.from_log_tilt(
            torch.where(torch.rand(2048, generator=generator) < share, 2.9, 0.0) + 0.05 * torch.randn(2048, generator=generator)
        ).unknown()
        for _ in range(20)
    ]
    assert seen == [None] * 20


def test_the_error_of_the_divergence_is_its_infinitesimal_jackknife(generator: torch.Generator) -> None:
    """By differentiating E[w log w] / E[w] - log E[w] in the masses of the samples."""
    log_w = 0.8 * torch.randn(60, generator=generator)
    mass = torch.full((60,), 1 / 60, requires_grad=True)
    mean = (mass * log_w.exp()).sum()
    value = (mass * log_w.exp() * log_w).sum() / mean - (mean / mass.sum()).log()
    (slope,) = torch.autograd.grad(value, mass)
    influence = slope - slope.mean()
    found = ImportanceWeights.from_log_tilt(log_w).divergence()
    assert found.value == pytest.approx(value.item())
    assert found.standard_error == pytest.approx(influence.square().sum().sqrt().item() / 60)


def test_the_divergence_of_a_tilted_normal_law(generator: torch.Generator) -> None:
    """Of N(m + s^2 c, s^2) from N(m, s^2): s^2 c^2 / 2; covered as it should be."""
    truth, hits = (SCALE * 1.2) ** 2 / 2, 0
    for _ in range(300):
        x = MEAN + SCALE * torch.randn(800, generator=generator)
        found = ImportanceWeights.from_rewards(x, 1 / 1.2).divergence()
        hits += int(abs(found.value - truth) < 1.96 * found.standard_error)
    assert hits / 300 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 300))


# ---- histograms ----


def test_total_variation_is_the_mass_that_must_move() -> None:
    assert total_variation(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.4, 0.5])) == pytest.approx(0.4)


def floor(weights: ImportanceWeights, count: int, distance: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    return weights.null_distances(count, [distance], generator, draws=4000)[0]


def test_floor_of_one_sample_each_is_the_chance_that_they_differ(generator: torch.Generator) -> None:
    """One sample of the target against a base of one sample: they are the same."""
    labels, p = torch.arange(3), torch.tensor([0.5, 0.3, 0.2])
    alone = floor(ImportanceWeights(torch.ones(1)), 1, histogram_masses(labels[:1], 3), generator)
    assert alone.tolist() == [0.0] * 4000
    # of many samples in the base, the chance that one drawn from it is not of the class of most weight, and so on
    base = torch.repeat_interleave(labels, torch.tensor([5000, 3000, 2000]))
    one = ImportanceWeights(torch.full((10_000,), 1e-4)).null_distances(1, [histogram_masses(base, 3)], generator, draws=400)[0]
    # the distance of a unit mass on class i is 1 - p_i
    expected, spread = 1 - p.square().sum().item(), (p * (1 - p).square()).sum().item() - (1 - p.square().sum().item()) ** 2
    assert abs(one.mean().item() - expected) < 4 * math.sqrt(spread / 400) + 0.01


@pytest.mark.parametrize("odds", [1.0, 20.0])
def test_floor_of_two_classes_is_that_of_a_normal_difference(odds: float, generator: torch.Generator) -> None:
    """E |N(0, v)| = sqrt(2 v / pi) with v = p (1 - p) / n + sum w^2 (f - p)^2. Where the weights differ by class, the second
    part is not p (1 - p) over the effective sample size: at odds of 20 it is a sixth of that. Both distances see the same."""
    labels = weighted_labels(500, 0.3)
    raw = torch.where(labels == 1, odds, 1.0) * (1 + torch.rand(500, generator=generator))
    weights = ImportanceWeights(raw / raw.sum())
    p = weights.weights @ labels.double()
    error = (weights.weights.square() * (labels - p).square()).sum()
    kong = (p * (1 - p) * (1 / 150 + 1 / 350) / (p**2 / 150 + (1 - p) ** 2 / 350)).item()
    assert (error * weights.effective_sample_size / (p * (1 - p))).item() == pytest.approx(kong, abs=0.02)
    assert kong == pytest.approx(1.0 if odds == 1 else 0.165, abs=0.01)
    std = math.sqrt(p * (1 - p) / 400 + error)
    for distance in (histogram_masses(labels, 2), reward_masses(labels.double())):
        # |N| has standard deviation 0.6; the normal approximation is off by a relative 1 / n at most
        found = floor(weights, 400, distance, generator).mean().item()
        assert abs(found - math.sqrt(2 / math.pi) * std) < std * (4 * 0.6 / math.sqrt(4000) + 1 / 100)


def test_floor_of_the_reward_is_what_an_exact_model_shows(generator: torch.Generator) -> None:
    """Base N(0, 1), tilted by one standard deviation: the target is N(1, 1), and an exact sample of it is as far away as the
    floor says. At 1,000 samples that is .05, which a report must not take for a distance."""
    floors, shown = [], []
    for _ in range(40):
        base, exact = torch.randn(1000, generator=generator), 1 + torch.randn(1000, generator=generator)
        weights = ImportanceWeights.from_rewards(base, 1.0)
        floors.append(weights.null_distances(1000, [reward_masses(base)], generator, draws=50)[0].mean())
        shown.append(torch.tensor(kolmogorov_smirnov(exact, base, weights.weights)))
    difference = torch.stack(shown) - torch.stack(floors)
    assert torch.stack(floors).mean().item() == pytest.approx(0.05, abs=0.01)
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(40)


def test_the_distance_over_groups_is_that_of_corrected_distribution_functions(generator: torch.Generator) -> None:
    """Against the largest gap over every value, by `group_means` of indicators; without a tilt it is that of the plain ones."""
    base, tuned = torch.randn(6 * 10, generator=generator), 0.5 + torch.randn(6 * 10, generator=generator)
    weights = ImportanceWeights.from_log_tilt(0.5 * base, 6)
    gaps = []
    for c in torch.cat([base, tuned]):
        gaps.append(((tuned <= c).double().mean() - weights.group_means((base <= c).double()).mean()).abs())
    found = DistanceOverGroups.of(tuned, base, weights)
    assert found.value == pytest.approx(torch.stack(gaps).max().item())
    assert found.bias.abs().max() > 0
    plain = DistanceOverGroups.of(tuned, base, ImportanceWeights.from_log_tilt(torch.zeros(60), 6))
    assert plain.value == pytest.approx(kolmogorov_smirnov(tuned, base, torch.full((60,), 1 / 60)))
    assert plain.bias.abs().max() < 1e-12


def test_the_null_over_few_groups_is_students(generator: torch.Generator) -> None:
    """At one threshold it is the law of |t| times the standard error, whose tails are heavy where groups are few."""
    gaps = torch.tensor([[0.01], [-0.02], [0.03], [0.005]])
    null = DistanceOverGroups(gaps, torch.zeros(1)).null(generator, draws=20_000) / (gaps.std() / 2)
    for p in (0.5, 0.9, 0.99):
        below = (null < t.ppf((1 + p) / 2, 3)).double().mean().item()
        assert below == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 20_000))
    biased = DistanceOverGroups(gaps, torch.tensor([0.6])).null(generator, draws=100)
    assert float(biased.min()) >= 0.2
    assert float(DistanceOverGroups(gaps[:2], torch.zeros(1)).null(generator).max()) <= 1  # Cauchy's law has no bound


def test_groups_stay_in_their_groups(generator: torch.Generator) -> None:
    """Where each of three groups holds one reward, nothing that is drawn inside of them moves any mass."""
    rewards = torch.arange(3.0).repeat_interleave(4)
    weights = ImportanceWeights.from_log_tilt(torch.randn(12, generator=generator), 3)
    assert float(floor(weights, 6, reward_masses(rewards), generator).max()) < 1e-12
    which = drawn_again(12, weights, generator).reshape(3, 4)
    assert (which % 4).tolist() == [[0, 1, 2, 3]] * 3
    with pytest.raises(ValueError, match="groups of equal size"):
        ImportanceWeights.from_log_tilt(torch.zeros(10), 3)


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


@pytest.mark.parametrize("groups", [2, 5])
def test_the_divergence_over_groups_is_the_jackknife_done_by_hand(groups: int, generator: torch.Generator) -> None:
    """Sample after sample is left out; the error has the spread over groups and a third of the bias, in quadrature."""
    tilt = torch.randn(groups, 7, generator=generator, dtype=torch.float64)

    def divergence(some: Tensor) -> float:
        w = torch.softmax(some, 0)
        return float((w * (w * len(some)).log()).sum())

    raw = [divergence(row) for row in tilt]
    without = [[divergence(row[torch.arange(7) != i]) for i in range(7)] for row in tilt]
    corrected = [7 * one - 6 * sum(each) / 7 for one, each in zip(raw, without, strict=True)]
    mean = sum(corrected) / groups
    spread = sum((each - mean) ** 2 for each in corrected) / (groups - 1) / groups
    found = ImportanceWeights.from_log_tilt(tilt.flatten(), groups).divergence()
    assert found.value == pytest.approx(mean)
    assert found.standard_error == pytest.approx(math.sqrt(spread + (mean - sum(raw) / groups) ** 2 / 9))


def test_where_groups_do_not_differ_the_null_distance_is_a_third_of_the_bias(generator: torch.Generator) -> None:
    distance = DistanceOverGroups(torch.full((4, 3), 0.2, dtype=torch.float64), torch.tensor([0.03, -0.09, 0.0]).double())
    assert_close(distance.null(generator, 5), torch.full((5,), 0.03, dtype=torch.float64))
