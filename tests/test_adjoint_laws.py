"""Laws of cheaper kinds of Adjoint Matching, against closed forms and dynamic programming."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lines import NARROW, NORMAL, TWO_MODES, bowl, hill, line
from scipy.integrate import solve_ivp
from scipy.special import ndtri

from tiltflow.laws.adjoint_laws import deterministic_control, score_round, slope, smoothed_tilt
from tiltflow.laws.law import Array, Density, Law, log_normal


def test_slope() -> None:
    x = np.linspace(-2, 2, 5)
    assert slope(np.tanh)(x) == pytest.approx(1 / np.cosh(x) ** 2, abs=1e-6)


# ---- scores of a smoothed base ----


@pytest.mark.parametrize(
    ("time", "mean", "variance", "bowl_variance", "rescaled"),
    [
        (0.98, 0.635986, 0.139704, 0.490004, (0.642803, 0.142993)),
        (0.95, 0.625046, 0.135436, 0.475066, (0.642497, 0.143757)),
        (0.9, 0.605344, 0.129771, 0.450549, (0.641278, 0.146805)),
    ],
)
def test_scores_before_the_end(
    time: float, mean: float, variance: float, bowl_variance: float, rescaled: tuple[float, float]
) -> None:
    law = smoothed_tilt(NARROW, hill, 1.0, time)
    assert (law.mean, law.variance) == pytest.approx((mean, variance), abs=1e-6)
    assert smoothed_tilt(NORMAL, bowl, 1.0, time).variance == pytest.approx(bowl_variance, abs=1e-6)
    law = smoothed_tilt(NARROW, hill, 1.0, time, rescaled=True)
    assert (law.mean, law.variance) == pytest.approx(rescaled, abs=1e-6)


@pytest.mark.parametrize("rescaled", [False, True])
def test_scores_before_the_end_at_a_temperature(rescaled: bool) -> None:
    """N(0.7, 0.25) at t = 0.9 is N(0.63, 0.2125), and divided by t N(0.7, 0.2623)."""
    m, v = (0.7, 0.2125 / 0.81) if rescaled else (0.63, 0.2125)
    variance = 1 / (1 / v + 3 / 0.4)
    law = smoothed_tilt(NARROW, hill, 0.4, 0.9, rescaled=rescaled)
    assert (law.mean, law.variance) == pytest.approx((variance * (m / v + 1.7 / 0.4), variance), abs=1e-6)


@pytest.mark.parametrize(
    ("base", "reward", "reference", "multiplier"),
    [
        pytest.param(NORMAL, bowl, 1.0, -0.39, marks=pytest.mark.slow),
        pytest.param(NARROW, hill, 1.0, -1.27, marks=pytest.mark.slow),
        (NARROW, hill, 0.25, -0.31),
    ],
)
def test_a_round_by_scores_stays_at_the_tilt_and_is_unstable_around_another_gaussian(
    base: Law, reward: Density, reference: float, multiplier: float
) -> None:
    """Of a bowl, from variance S + d: S - .39 d; on the hill, from a reference of variance 1, -1.27 d, and from the base's
    own, -.31 d."""
    exact, d = base.tilt(reward(base.points)), 0.01
    z = (base.points - exact.mean) ** 2 / 2
    up, down = (exact.tilt(sign * d * z) for sign in (1, -1))
    after = [score_round(q, base, reward, 1.0, reference).variance for q in (up, down)]
    assert (after[0] - after[1]) / (up.variance - down.variance) == pytest.approx(multiplier, abs=5e-3)
    assert np.mean(after) == pytest.approx(exact.variance, abs=1e-4)


def test_a_round_by_scores_of_a_gaussian() -> None:
    """From N(0.2, 0.3), with N(1, 0.4) as reference, on the hill at beta = 0.5: an affine field, an ODE of two numbers."""

    def change(t: float, state: list[float]) -> list[float]:
        """Of the mean and the log variance: that of v = v_N + (1 - t) S / V (E[f | x] + (E[x_1 | x] - m) / S), f the force."""
        (m, S), (mean, variance) = (1.0, 0.4), (0.2, 0.3)
        V, gain = t**2 * S + (1 - t) ** 2, t * variance / (t**2 * variance + (1 - t) ** 2)
        A, weight = (t * S - (1 - t)) / V, (1 - t) * S / V

        def velocity(x: float) -> float:
            x1 = mean + gain * (x - t * mean)
            force = (1.7 - 3 * x1) / 0.5 - (x1 - 0.7) / 0.25
            return m + A * (x - t * m) + weight * (force + (x1 - m) / S)

        return [velocity(state[0]), 2 * (velocity(1.0) - velocity(0.0))]

    mean, log_variance = solve_ivp(change, (0, 1), [0.0, 0.0], rtol=1e-9, atol=1e-9).y[:, -1]
    law = score_round(Law.of(lambda x: log_normal(x, 0.2, 0.3**0.5)), NARROW, hill, 0.5, 0.4)
    assert (law.mean, law.variance) == pytest.approx((mean, math.exp(log_variance)), abs=1e-5)


@pytest.mark.slow
def test_rounds_by_scores_do_not_see_the_weights_of_modes() -> None:
    """The log odds of modes at -1.5 and 1.5 that are wrong by some are still wrong by 96 % of it after an exact round."""
    odds, exact = [], TWO_MODES.tilt(np.tanh(TWO_MODES.points))
    for sign in (1, -1):
        q = exact.tilt(sign * 0.1 * np.sign(exact.points))
        after = score_round(q, TWO_MODES, np.tanh, 1.0, TWO_MODES.variance)
        odds.append([math.log(law.positive / (1 - law.positive)) for law in (q, after)])
    (before, after_up), (before_down, after_down) = odds
    assert (after_up - after_down) / (before - before_down) == pytest.approx(0.960, abs=5e-3)


# ---- control without noise ----


@pytest.mark.parametrize(
    ("from_time", "mean", "variance", "bowl_variance"),
    [
        (0.0, 0.606394, 0.022195, 0.151309),
        pytest.param(0.75, 0.637513, 0.070583, 0.572402, marks=pytest.mark.slow),
        (0.9, 0.667068, 0.141756, 0.810662),
    ],
)
def test_control_without_noise_of_a_gaussian(from_time: float, mean: float, variance: float, bowl_variance: float) -> None:
    """Mean (m + c G / beta) / (1 + q G / beta), variance S / (1 + q G / beta)^2, G the integral of S / V: pi sqrt(S) / 2."""
    law = deterministic_control(NARROW, hill, 1.0, from_time)
    assert (law.mean, law.variance) == pytest.approx((mean, variance), abs=2e-5)
    assert deterministic_control(NORMAL, bowl, 1.0, from_time).variance == pytest.approx(bowl_variance, abs=2e-5)


def test_control_without_noise_at_a_temperature() -> None:
    """On a Gaussian as above; between modes the reward alone is scaled, and the price of the way to it is not."""
    law, gain = deterministic_control(NARROW, hill, 0.4), math.pi / 4 / 0.4
    assert (law.mean, law.variance) == pytest.approx(
        ((0.7 + 1.7 * gain) / (1 + 3 * gain), 0.25 / (1 + 3 * gain) ** 2), abs=2e-5
    )
    law, scaled = (
        deterministic_control(TWO_MODES, np.tanh, 2.0),
        deterministic_control(TWO_MODES, lambda x: np.tanh(x) / 2, 1.0),
    )
    assert law.log_density == pytest.approx(scaled.log_density)


def test_control_without_noise_shifts_too_far() -> None:
    assert deterministic_control(NORMAL, line, 1.0).mean == pytest.approx(math.pi / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("height", "steepness", "beta", "reward", "positive", "first", "last"),
    [
        (1, 1, 1.0, 0.6909, 0.9115, -1.89, 0.85),
        (1, 1, 0.5, 0.8425, 0.9770, -2.28, 1.0),
        (2, 3, 1.0, 1.9224, 0.9864, -2.46, 0.63),
    ],
)
def test_control_without_noise_leaves_a_gap_between_modes(
    height: float, steepness: float, beta: float, reward: float, positive: float, first: float, last: float
) -> None:
    """Two paths that start together and are worth the same end at either side of it; in the last case more than two start
    together. Against paths from 16,001 ends, of which each noise takes the best one."""

    def step(x: Array) -> Array:
        return height * np.tanh(steepness * x)

    law = deterministic_control(TWO_MODES, step, beta)
    assert law.expectation(step) == pytest.approx(reward, abs=2.5e-3)
    assert law.positive == pytest.approx(positive, abs=1e-3)
    inside = (law.points > first + 0.05) & (law.points < last - 0.05)
    assert (law.log_density[inside] < -30).all()


@pytest.mark.slow
def test_control_without_noise_of_two_modes() -> None:
    """Against dynamic programming: which noise is worth carrying across is decided where the values of two paths meet."""
    steps, x, controls = 200, np.linspace(-6, 6, 1201), np.linspace(-6, 6, 401)
    h, value, policy = 1 / steps, np.tanh(x), []
    drift = [TWO_MODES.velocity(x, (k + 0.5) * h) for k in range(steps)]
    for v in drift[::-1]:
        worth = np.stack([np.interp(x + h * (v + u), x, value) - h * u**2 / 2 for u in controls])
        policy.append(controls[worth.argmax(0)])
        value = worth.max(0)
    y = ndtri((np.arange(20_000) + 0.5) / 20_000)
    for v, u in zip(drift, policy[::-1], strict=True):
        y = y + h * np.interp(y, x, v + u)
    law = deterministic_control(TWO_MODES, np.tanh, 1.0)
    assert (law.expectation(np.tanh), law.positive) == pytest.approx((np.tanh(y).mean(), (y > 0).mean()), abs=1e-3)
