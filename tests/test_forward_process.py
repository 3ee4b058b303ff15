"""The laws of forward-process regression, against closed forms, one another, and quadratures of another kind."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from lines import NARROW, NORMAL, TWO_MODES, bowl, hill
from scipy.special import lambertw, ndtri

from tiltflow.laws.forward_process import explicit_rounds, noise_over_signal, ram, regression, reverse, tilting_rate
from tiltflow.laws.law import GRID, Array, Field, Law


def particles(field: Field, count: int, steps: int) -> Array:
    """Equally probable points of the law of a field's ODE, forward from those of the noise by Runge-Kutta 4."""
    x, times = ndtri((np.arange(count) + 0.5) / count), (1 - np.cos(np.pi * np.arange(steps + 1) / steps)) / 2
    for s, t in pairwise(times):
        h = t - s
        k1 = field(x, s)
        k2 = field(x + h / 2 * k1, s + h / 2)
        k3 = field(x + h / 2 * k2, s + h / 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + field(x + h * k3, t))
    return x


def two_modes_given(x: Array, t: float, nodes: int = 40) -> tuple[Array, Array, Array]:
    """x_1 and u given x_t = x and their probabilities, [n, 2 nodes] each: each mode's posterior is Gaussian."""
    z, weights = np.polynomial.hermite_e.hermegauss(nodes)
    variance, parts = t**2 / 4 + (1 - t) ** 2, []
    for mean in (-1.5, 1.5):
        away = (x - t * mean)[:, None]
        x1 = mean + t / 4 / variance * away + (1 - t) / 2 / math.sqrt(variance) * z
        u = mean + (t / 4 - (1 - t)) / variance * away + 1 / 2 / math.sqrt(variance) * z
        parts.append((x1, u, np.exp(-(away**2) / 2 / variance) * weights))
    x1, u, p = (np.concatenate(each, 1) for each in zip(*parts, strict=True))
    return x1, u, p / p.sum(1, keepdims=True)


# ---- the tilting identity ----


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 0.95])
def test_the_field_of_a_tilt_moves_by_the_covariance(t: float) -> None:
    """d v / d eta = Cov(r, u | x_t): by central differences in eta."""
    x, step = np.linspace(-2, 2, 9), 1e-3
    q = TWO_MODES.tilt(0.5 * np.tanh(TWO_MODES.points))
    up, down = (q.tilt(sign * step * np.tanh(q.points)).velocity(x, t) for sign in (1, -1))
    assert tilting_rate(q, np.tanh)(x, t) == pytest.approx((up - down) / (2 * step), abs=1e-6)


@pytest.mark.parametrize("t", [0.2, 0.8])
def test_the_covariance_is_that_of_a_gradient_where_the_posterior_is_gaussian(t: float) -> None:
    """Stein: Cov(r, u | x_t) = w_t / (1 - t) E[r' | x_t], w_t = S (1 - t)^2 / V_t the variance of x_1."""
    x, variance = np.linspace(-1, 2, 7), 0.25
    w = variance * (1 - t) ** 2 / (t**2 * variance + (1 - t) ** 2)
    given = NARROW.given(x, t)
    slope = given.mean(1 / np.cosh(given.data) ** 2)
    assert tilting_rate(NARROW, np.tanh)(x, t) == pytest.approx(w / (1 - t) * slope, abs=1e-6)


# ---- one regression ----


@pytest.mark.parametrize("t", [0.25, 0.75])
def test_implicit_tilt_matching_is_the_field_of_the_weighted_law(t: float) -> None:
    """For weights w / Z - 1, and w / Z - kappa over kappa: the same law."""
    x, q = np.linspace(-2.5, 2.5, 11), TWO_MODES
    total = q.expectation(lambda x: np.exp(np.tanh(x)))
    exact = q.tilt(np.tanh(q.points)).velocity(x, t)
    for kappa in (1.0, 0.5, 3.0):
        field = regression(q, lambda x, k=kappa: np.exp(np.tanh(x)) / total / k - 1, q.velocity, "network")
        assert field(x, t) == pytest.approx(exact, abs=1e-6)
    assert np.abs(regression(q, lambda x: np.exp(np.tanh(x)) / total - 1, q.velocity, "anchor")(x, t) - exact).max() > 0.05


@pytest.mark.parametrize("residual", ["network", "samples", "anchor"])
def test_a_constant_reward_teaches_nothing(residual: Any) -> None:
    x, q = np.linspace(-2, 2, 5), TWO_MODES.tilt(0.2 * TWO_MODES.points)
    assert regression(q, np.zeros_like, NORMAL.velocity, residual)(x, 0.6) == pytest.approx(NORMAL.velocity(x, 0.6))


def test_each_residual_on_a_linear_reward() -> None:
    """L1 around its own field: E[C | x_t] = h (x1hat - m), E[C u | x_t] by Gaussian moments."""
    x, t, h, mean = np.linspace(-1, 1, 5), 0.4, 0.3, 0.1
    variance = t**2 + (1 - t) ** 2
    x1, u, covariance = t / variance * x, (2 * t - 1) / variance * x, (1 - t) / variance
    c, pull = h * (x1 - mean), h * (covariance + (x1 - mean) * u)
    anchor = 0.7 * x
    for residual, expected in (
        ("network", (anchor + pull) / (1 + c)),
        ("samples", anchor + pull - c * u),
        ("anchor", anchor + pull - c * anchor),
    ):
        field = regression(NORMAL, lambda x: h * (x - mean), lambda x, t: 0.7 * x, residual)  # type: ignore[arg-type]
        assert field(x, t) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("least", "pole"), [(-0.999, False), (-1.0, True), (-1.001, True)])
def test_the_regression_on_the_network_itself_has_no_minimum_from_minus_one_on(least: float, pole: bool) -> None:
    """One sample, at 0: there E[C | x_t] is C itself."""
    q, x = Law(GRID, np.where(GRID == 0, 0.0, -1e5)), np.zeros(1)
    field = regression(q, lambda x: np.full_like(x, least), NORMAL.velocity, "network")
    if pole:
        with pytest.raises(ValueError, match="pole"):
            field(x, 0.25)
    else:
        assert field(x, 0.25) == pytest.approx(0.0, abs=1e-9)


# ---- rounds ----


def test_one_explicit_round_overshoots_a_bowl() -> None:
    """Variance S exp(-q S / beta) where the tilt has S / (1 + q S / beta)."""
    assert explicit_rounds(NORMAL, bowl, 1.0, 1).variance == pytest.approx(math.exp(-1), abs=2e-6)
    law = explicit_rounds(NARROW, hill, 1.0, 1)
    assert (law.mean, law.variance) == pytest.approx((0.621620, 0.118092), abs=2e-6)


def test_one_explicit_round_on_two_modes() -> None:
    """Against particles that move forward in a field of another quadrature, and what they say."""

    def field(x: Array, t: float) -> Array:
        x1, u, p = two_modes_given(x, t)
        r, v = np.tanh(x1), (p * u).sum(1)
        return np.asarray(v + (p * r * u).sum(1) - (p * r).sum(1) * v)

    law, x = explicit_rounds(TWO_MODES, np.tanh, 1.0, 1), particles(field, 2000, 24)
    assert law.expectation(np.tanh) == pytest.approx(0.61845, abs=1e-5)
    assert law.expectation(np.tanh) == pytest.approx(np.tanh(x).mean(), abs=2e-4)
    assert (law.mean, law.variance) == pytest.approx((x.mean(), x.var()), abs=6e-4)


def test_two_explicit_rounds() -> None:
    """From the exact field of the samples: S exp(-h S) twice, h = 1/2. From the last network, which is not that field, another
    law."""
    once = math.exp(-0.5)
    assert explicit_rounds(NORMAL, bowl, 1.0, 2, "samples").variance == pytest.approx(once * math.exp(-once / 2), abs=5e-6)
    assert explicit_rounds(NORMAL, bowl, 1.0, 2).variance == pytest.approx(0.44960, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["anchor", "samples"])
def test_the_error_of_explicit_rounds_falls_as_one_over_their_number(residual: Any) -> None:
    exact = TWO_MODES.tilt(np.tanh(TWO_MODES.points)).expectation(np.tanh)
    errors = [explicit_rounds(TWO_MODES, np.tanh, 1.0, n, residual).expectation(np.tanh) - exact for n in (4, 8, 16)]
    assert 1.5 < errors[0] / errors[1] < 2.5
    assert 1.7 < errors[1] / errors[2] < 2.3


@pytest.mark.parametrize(
    ("rounds", "weighted", "implicit"),
    [(1, (2.2, 2.2), (1.0, 1.0)), (4, (37, 47), (0.9, 2.3)), (16, (598, 937), (0.8, 3.0))],
)
def test_the_noise_of_implicit_rounds_does_not_grow_with_their_number(
    rounds: int, weighted: tuple[float, float], implicit: tuple[float, float]
) -> None:
    """In the first and the last; that of reward-weighted regression grows with the square."""
    for before, expected in zip((0, 1 - 1 / rounds), zip(weighted, implicit, strict=True), strict=True):
        found = noise_over_signal(TWO_MODES.tilt(before * np.tanh(TWO_MODES.points)), np.tanh, 1 / rounds)
        assert found["reward-weighted"] == pytest.approx(expected[0], rel=0.03)
        assert found["implicit"] == pytest.approx(expected[1], abs=0.06)


def test_the_noise_of_a_round_in_closed_form() -> None:
    """A shift by h of N(0, 1), to first order in h: W - 1 = h x_1, and u - v has variance 1 / V at t. Over x_t the mean of
    (h x_1 (u - v) - h E)^2 is h^2 (E[x_1^2] (u - v)^2 - E^2), E = (1 - t) / V: by Gaussian moments 1 / V + E^2."""
    h, t = 1e-3, (np.arange(2000) + 0.5) / 2000
    v = t**2 + (1 - t) ** 2
    signal = (((1 - t) / v) ** 2).mean()
    found = noise_over_signal(NORMAL, lambda x: x, h)
    assert found["implicit"] == pytest.approx(((1 / v).mean() + signal) / signal, rel=5e-3)
    assert found["reward-weighted"] == pytest.approx((1 / v).mean() / signal / h**2, rel=5e-3)


# ---- where rounds around the base settle ----


@pytest.mark.parametrize("eta", [4.0, pytest.param(0.25, marks=pytest.mark.slow), pytest.param(1.0, marks=pytest.mark.slow)])
def test_ram_undershoots_a_bowl(eta: float) -> None:
    """Variance W(x) / x with Lambert's function, x = eta q S, where the tilt has 1 / (1 + x)."""
    assert ram(NORMAL, bowl, 1 / eta, "samples").variance == pytest.approx(lambertw(eta).real / eta, abs=2e-5)


@pytest.mark.slow
def test_ram_on_the_hill() -> None:
    for beta, expected in ((2.0, (0.668361, 0.188443)), (1.0, (0.652630, 0.156383)), (0.5, (0.635606, 0.120977))):
        law = ram(NARROW, hill, beta, "samples")
        assert (law.mean, law.variance) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_ram_on_a_linear_reward_is_the_tilt() -> None:
    law = ram(NORMAL, lambda x: x, 1.0, "samples")
    assert (law.mean, law.variance) == pytest.approx((1.0, 1.0), abs=2e-5)


def test_ram_as_published_on_two_modes() -> None:
    """Its law solves its own equation: particles forward in the field that its samples make of it."""
    law = ram(TWO_MODES, np.tanh, 2.5)
    assert law.expectation(np.tanh) == pytest.approx(0.27944, abs=1e-5)
    own, mean = TWO_MODES, law.expectation(np.tanh)
    x1 = law.quantiles((np.arange(1000) + 0.5) / 1000)

    def field(x: Array, t: float) -> Array:
        if t > 0.98:  # the points are too few for the narrow kernel: the field goes on from where it was
            return field(x, 0.98)
        p = np.exp(-((x[:, None] - t * x1) ** 2) / 2 / (1 - t) ** 2)
        p, a = p / p.sum(1, keepdims=True), (np.tanh(x1) - mean) / 2.5
        u = (x1 - x[:, None]) / (1 - t)
        return np.asarray((own.velocity(x, t) + (p * a * u).sum(1)) / (1 + p @ a))

    assert np.tanh(particles(field, 500, 16)).mean() == pytest.approx(mean, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("residual", "eta", "reward", "positive", "kl"),
    [
        ("samples", 0.4, 0.27999, 0.65887, 0.05384),
        ("anchor", 0.4, 0.27591, 0.65585, 0.05098),
        ("samples", 1.0, 0.53173, 0.80355, 0.22104),
        ("anchor", 1.0, 0.51581, 0.78890, 0.18853),
        ("samples", 1 / 0.3, 0.77283, 0.94731, 0.57736),
        ("anchor", 1 / 0.3, 0.77310, 0.92201, 0.51255),
    ],
)
def test_ram_on_two_modes(residual: Any, eta: float, reward: float, positive: float, kl: float) -> None:
    """Less than the tilt: .29289, .61689 and .89566."""
    law = ram(TWO_MODES, np.tanh, 1 / eta, residual)
    assert (law.expectation(np.tanh), law.positive) == pytest.approx((reward, positive), abs=3e-5)
    assert law.kl(TWO_MODES) == pytest.approx(kl, abs=5e-5)


@pytest.mark.slow
def test_ram_with_clipped_advantages_has_no_pole() -> None:
    """And reaches less than without clipping, where that is a law at all."""
    rewards = [ram(TWO_MODES, np.tanh, beta, lowest=-0.9).expectation(np.tanh) for beta in (2.5, 1.0, 0.3)]
    assert rewards == pytest.approx([0.27944, 0.45865, 0.59579], abs=2e-5)
    assert ram(NORMAL, bowl, 1.0, lowest=-0.9).variance == pytest.approx(0.63313, abs=2e-5)


def test_ram_as_published_has_a_pole() -> None:
    """Where samples are worse than the mean by more than beta: for a bounded reward below a temperature, else always."""
    for law, reward, beta in ((TWO_MODES, np.tanh, 1.0), (NORMAL, bowl, 1.0), (NORMAL, lambda x: x, 1.0)):
        with pytest.raises(ValueError, match="pole"):
            ram(law, reward, beta)


def test_the_reverse_form_settles_at_the_tilt() -> None:
    """Whatever number is added to the reward."""
    law, exact = reverse(TWO_MODES, lambda x: np.tanh(x) + 20, 1.5), TWO_MODES.tilt(np.tanh(TWO_MODES.points) / 1.5)
    assert (law.mean, law.variance) == pytest.approx((exact.mean, exact.variance), abs=3e-5)
    assert law.kl(exact) == pytest.approx(0, abs=1e-7)


@pytest.mark.slow
def test_the_reverse_form_runs_away_from_rewards_that_spread_far() -> None:
    for law, reward, beta in ((TWO_MODES, np.tanh, 0.3), (NORMAL, bowl, 1.0)):
        with pytest.raises(ValueError, match="no law was found"):
            reverse(law, reward, beta)
