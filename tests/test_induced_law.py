"""The exact law of reward-weighted flow matching, against closed forms and values known to three digits or more."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lines import NORMAL, TWO_MODES

from tiltflow.evaluation.distances import exact_w2
from tiltflow.laws.induced_law import fixed_point, induced_velocity, mixture_of_rounds, one_round
from tiltflow.laws.law import Law, log_normal, push_forward, velocity_distance
from tiltflow.problems.two_modes import sampler
from tiltflow.streams import stream


def gaussian(mean: float, std: float) -> Law:
    return Law.of(lambda x: log_normal(x, mean, std))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 1.3), (-0.5, 1.5)])
def test_a_gaussian_is_known_between_the_points_and_beyond_them(mean: float, std: float) -> None:
    """Its log density is one parabola, normalised: so is what goes on beyond the last point, 8, at either end."""
    law = gaussian(mean, std)
    x = np.array([-11.0, -8.5, -8.0, -3.21, 0.011, 4.4, 8.0, 8.5, 11.0])
    assert law.log_at(x) == pytest.approx(log_normal(x, mean, std), abs=2e-5)
    assert law.probabilities.sum() == pytest.approx(1)
    assert np.exp(law.log_density).sum() * (law.points[1] - law.points[0]) == pytest.approx(1)


@pytest.mark.parametrize("side", [-1, 1])
def test_a_tail_that_opens_upward_goes_on_as_a_line(side: int) -> None:
    """Through the end; its slope has the least squares over the last 24 points, sum of near^3 / 20 over that of near^2 more
    than at the end."""
    law = Law.of(lambda x: -3 * np.abs(x) + (x - side * 8) ** 2 / 20)
    near = -np.arange(24) * 0.05  # distances from the end, of 321 points on [-8, 8]
    slope = -3 + (near**3).sum() / (near**2).sum() / 20
    end = law.log_at(np.array([side * 8.0]))[0]
    assert law.log_at(np.array([side * 10.0, side * 8.3])) - end == pytest.approx(np.array([2, 0.3]) * slope, abs=1e-6)


@pytest.mark.parametrize(
    ("rounds", "mean", "variance", "reward", "positive", "w2", "kl"),
    [
        (1, 1.10071, 1.38632, 0.61689, 0.84832, 1.4487, 0.2756),
        (2, 1.50666, 0.48336, 0.83608, 0.96867, 1.8683, 0.5799),
        (4, 1.66872, 0.20492, 0.90430, 0.99884, 2.0392, 0.7589),
        (16, 1.91716, 0.14656, 0.94554, 1.00000, 2.2770, 1.1068),
    ],
)
def test_without_a_penalty_the_law_is_the_power_of_the_weight(
    rounds: int, mean: float, variance: float, reward: float, positive: float, w2: float, kl: float
) -> None:
    """exp(n tanh x) p: known values; and n rounds of the operator are that law."""
    law = TWO_MODES
    for _ in range(rounds):
        law = one_round(law, TWO_MODES, np.tanh, 0.0)
    assert law.mean == pytest.approx(mean, abs=1e-5)
    assert law.variance == pytest.approx(variance, abs=1e-5)
    assert law.expectation(np.tanh) == pytest.approx(reward, abs=1e-5)
    assert law.positive == pytest.approx(positive, abs=2e-5)
    assert law.w2(TWO_MODES) == pytest.approx(w2, abs=2e-4)
    assert law.kl(TWO_MODES) == pytest.approx(kl, abs=1e-4)


def test_the_collapse_onto_the_best_point() -> None:
    """r = -(x - c)^2 / 2 on N(m, s^2): variance s^2 / (1 + n tau s^2), mean (m + n tau s^2 c) / (1 + n tau s^2)."""
    m, s, c, tau = 0.3, 0.8, 1.0, 0.5
    law = gaussian(m, s)
    for n in (1, 5, 50):
        tilted = law.tilt(-n * tau * (law.points - c) ** 2 / 2)
        spread = 1 + n * tau * s**2
        assert tilted.mean == pytest.approx((m + n * tau * s**2 * c) / spread, abs=1e-9)
        assert tilted.variance == pytest.approx(s**2 / spread, abs=1e-9)


def test_the_field_of_a_law_carries_noise_to_that_law() -> None:
    """The backward transport of the exact field, against the density that it must have: the error is that of Runge-Kutta 4."""
    x, errors = np.linspace(-2.5, 2.5, 21), []
    for steps in (24, 48):
        law = push_forward(TWO_MODES.velocity, steps=steps)
        assert law.mean == pytest.approx(0, abs=1e-9)
        errors.append(np.abs(law.log_at(x) - TWO_MODES.log_at(x)).max())
    assert errors[1] < 2e-4
    assert 12 < errors[0] / errors[1] < 22


def test_the_field_of_a_gaussian() -> None:
    """v = m + (t s^2 - (1 - t)) / (t^2 s^2 + (1 - t)^2) (x - t m), on both sides of t = 1/2, and at the ends."""
    law, x = gaussian(0.7, 0.5), np.linspace(-2, 2, 9)
    for t in (0.0, 0.2, 0.49, 0.51, 0.9, 1.0):
        slope = (t * 0.25 - (1 - t)) / (t**2 * 0.25 + (1 - t) ** 2)
        assert law.velocity(x, t) == pytest.approx(0.7 + slope * (x - t * 0.7), abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "alpha", "mean", "reward", "positive"),
    [
        ("raw", 1.0, 0.64338, 0.36058, 0.70359),
        ("normalized", 1.0, 0.55036, 0.30845, 0.67416),
        ("both-terms", 1.0, 0.58806, 0.33143, 0.68831),
        ("raw", 0.3, 0.90725, 0.50846, 0.78710),
        ("normalized", 0.3, 0.84671, 0.47453, 0.76794),
        ("both-terms", 0.3, 0.88131, 0.49714, 0.78253),
    ],
)
def test_one_round_with_a_penalty(mode: str, alpha: float, mean: float, reward: float, positive: float) -> None:
    law = one_round(TWO_MODES, TWO_MODES, np.tanh, alpha, mode)
    assert law.mean == pytest.approx(mean, abs=2e-5)
    assert law.expectation(np.tanh) == pytest.approx(reward, abs=2e-5)
    assert law.positive == pytest.approx(positive, abs=2e-5)


def test_rounds_on_a_gaussian_with_a_linear_reward() -> None:
    """both-terms: N(m_n, s^2) with m_n = (tau s^2 / alpha) (1 - (1 + alpha)^-n), at last exactly exp(tau x / alpha)."""
    law, tau, alpha = NORMAL, 0.5, 2.0
    for n in (1, 2, 3):
        law = one_round(law, NORMAL, lambda x: tau * x, alpha, "both-terms")
        assert law.mean == pytest.approx(tau / alpha * (1 - (1 + alpha) ** -n), abs=1e-6)
        assert law.variance == pytest.approx(1, abs=1e-5)
    assert fixed_point(NORMAL, lambda x: tau * x, alpha, "both-terms").mean == pytest.approx(0.25, abs=1e-5)


@pytest.mark.slow
def test_the_fixed_point_of_a_gaussian_with_a_quadratic_reward_is_not_the_tilted_law() -> None:
    """both-terms: s^2 (1 + tau s^2)^(1 / alpha) = s_0^2; the golden ratio here, where KL would give 1/2."""
    law = fixed_point(NORMAL, lambda x: -((x - 1) ** 2) / 2, 1.0, "both-terms")
    assert law.variance == pytest.approx((math.sqrt(5) - 1) / 2, abs=1e-4)
    assert law.mean == pytest.approx(0.344706, abs=1e-4)


def test_a_fixed_point_with_bounded_reward() -> None:
    law = fixed_point(TWO_MODES, np.tanh, 3.0)
    weight = np.tanh(law.points) - math.log(law.expectation(lambda x: np.exp(np.tanh(x))))
    field = induced_velocity(law, TWO_MODES, weight, 3.0)
    distance, penalty = law.w2(TWO_MODES), velocity_distance(law, TWO_MODES, field)
    found = (law.mean, law.variance, law.expectation(np.tanh), law.positive, distance, penalty, law.kl(TWO_MODES))
    assert found == pytest.approx((0.3154, 2.413, 0.1767, 0.5998, 0.544, 0.0520, 0.0207), abs=6e-4)
    assert distance**2 / penalty == pytest.approx(5.69, abs=0.03)
    # a fixed point of `normalized` is one of `raw` at alpha E_q[w]
    again = one_round(law, TWO_MODES, np.tanh, 3.0 * law.expectation(lambda x: np.exp(np.tanh(x))), "raw")
    assert again.mean == pytest.approx(law.mean, abs=1e-5)


def test_the_penalty_is_proportional_to_the_distance_between_gaussians() -> None:
    """J = pi / (4 s_2) W2^2 for fields of N(m_1, s_1^2) and N(m_2, s_2^2), x_t from the first."""
    for (m1, s1), (m2, s2), expected in (((0.7, 0.5), (0.0, 1.0), 0.581195), ((0.3, 1.4), (-0.5, 0.6), 1.675516)):
        a, b = gaussian(m1, s1), gaussian(m2, s2)
        assert velocity_distance(a, b) == pytest.approx(expected, rel=2e-4)
        assert a.w2(b) ** 2 == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2, rel=2e-3)


@pytest.mark.parametrize(
    ("fraction", "mean", "reward", "positive"),
    [(0.25, 1.25876, 0.70025, 0.89335), (0.5, 1.42868, 0.78232, 0.93521), (0.75, 1.64886, 0.86463, 0.97124)],
)
def test_rounds_that_are_only_partly_online(fraction: float, mean: float, reward: float, positive: float) -> None:
    law = mixture_of_rounds(TWO_MODES, np.tanh, fraction)
    assert law.mean == pytest.approx(mean, abs=1e-5)
    assert law.expectation(np.tanh) == pytest.approx(reward, abs=1e-5)
    assert law.positive == pytest.approx(positive, abs=3e-5)
    # and it is one: w ((1 - f) p + f q), normalised, is q
    w = np.exp(np.tanh(law.points))
    mixed = w * ((1 - fraction) * TWO_MODES.probabilities + fraction * law.probabilities)
    assert mixed / mixed.sum() == pytest.approx(law.probabilities, abs=1e-9)


def test_too_much_of_the_current_model_leaves_no_law() -> None:
    with pytest.raises(ValueError, match="no law to settle at"):
        mixture_of_rounds(TWO_MODES, np.tanh, 0.95)
    with pytest.raises(ValueError, match="do not settle"):
        fixed_point(TWO_MODES, np.tanh, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "alpha", "mean", "variance", "reward", "positive", "w2", "kl"),
    [
        ("normalized", 10.0, 0.1052, 2.497, 0.0589, 0.5333, 0.223, 0.0023),
        ("normalized", 1.0, 0.7199, 1.973, 0.4039, 0.7288, 1.031, 0.1128),
        ("normalized", 0.3, 1.2591, 0.908, 0.7053, 0.9016, 1.589, 0.4014),
        ("raw", 3.0, 0.4887, 2.269, 0.2739, 0.6549, 0.766, 0.0503),
        ("raw", 1.0, 1.0591, 1.345, 0.5948, 0.8383, 1.387, 0.2662),
        ("both-terms", 1.0, 0.7772, 1.653, 0.4323, 0.7427, 1.064, 0.1704),
        ("both-terms", 0.3, 1.2915, 0.659, 0.7279, 0.9148, 1.612, 0.5205),
    ],
)
def test_fixed_points(
    mode: str, alpha: float, mean: float, variance: float, reward: float, positive: float, w2: float, kl: float
) -> None:
    law = fixed_point(TWO_MODES, np.tanh, alpha, mode)
    found = (law.mean, law.variance, law.expectation(np.tanh), law.positive, law.w2(TWO_MODES), law.kl(TWO_MODES))
    assert found == pytest.approx((mean, variance, reward, positive, w2, kl), abs=6e-4)


@pytest.mark.slow
def test_weak_tilts_are_those_of_the_tilted_law() -> None:
    """To first order in tau the fixed point is p exp(tau r / alpha): the difference of the mean reward falls like tau^2."""
    wrong = []
    for tau in (0.4, 0.2, 0.1):
        law = fixed_point(TWO_MODES, lambda x, tau=tau: tau * np.tanh(x), 1.0)
        wrong.append(abs(law.expectation(np.tanh) - TWO_MODES.tilt(tau * np.tanh(law.points)).expectation(np.tanh)))
    orders = np.log2(np.array(wrong[:-1]) / np.array(wrong[1:]))
    assert np.all(orders > 1.7)


@pytest.mark.slow
def test_the_penalty_bounds_the_distance() -> None:
    """W2^2 <= (e^{2 L} - 1) / (2 L) J (2502.06061, Theorem 3, sharpened), L being the Lipschitz constant of the second
    field; W2 by linear programming. What is measured is far below the bound: 4 s / pi for Gaussians."""
    generator = stream(0, "test")
    for d in (0.5, 1.5):
        moved = gaussian(d, 1.0)
        w2 = exact_w2(sampler(moved)(1500, generator), sampler(NORMAL)(1500, generator))
        penalty = velocity_distance(moved, NORMAL)
        assert w2 == pytest.approx(d, abs=4 * math.sqrt(2 / 1500) + 0.02)  # the samples' means
        slopes = np.diff(NORMAL.velocity(np.linspace(-1, 1, 3), 1.0))
        assert slopes == pytest.approx(1, abs=1e-6)  # the largest, at t = 1: L = 1
        assert w2**2 < (math.exp(2) - 1) / 2 * penalty
        assert d**2 / penalty == pytest.approx(4 / math.pi, rel=1e-3)
    law = one_round(TWO_MODES, TWO_MODES, np.tanh, 1.0)
    weight = np.tanh(law.points) - math.log(TWO_MODES.expectation(lambda x: np.exp(np.tanh(x))))
    penalty = velocity_distance(TWO_MODES, TWO_MODES, induced_velocity(TWO_MODES, TWO_MODES, weight, 1.0))
    w2 = exact_w2(sampler(law)(1500, generator), sampler(TWO_MODES)(1500, generator))
    assert w2 == pytest.approx(law.w2(TWO_MODES), abs=0.12)
    assert 1 < w2**2 / penalty < 20 < math.exp(2 * 10.01)
