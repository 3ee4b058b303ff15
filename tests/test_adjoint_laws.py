"""Laws of cheaper kinds of Adjoint Matching, against closed forms and dynamic programming."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lines import NARROW, NORMAL, TWO_MODES, bowl, hill, line
from scipy.special import ndtri

from tiltflow.laws.adjoint_laws import deterministic_control, score_round, slope, smoothed_tilt
from tiltflow.laws.law import Density, Law


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


@pytest.mark.parametrize(
    ("base", "reward", "reference", "multiplier"),
    [
        pytest.param(NORMAL, bowl, (0.0, 1.0), -0.39, marks=pytest.mark.slow),
        pytest.param(NARROW, hill, (0.0, 1.0), -1.27, marks=pytest.mark.slow),
        (NARROW, hill, (0.7, 0.25), -0.31),
    ],
)
def test_a_round_by_scores_stays_at_the_tilt_and_is_unstable_around_another_gaussian(
    base: Law, reward: Density, reference: tuple[float, float], multiplier: float
) -> None:
    """Of a bowl, from variance S + d: S - .39 d; on the hill, from a reference N(0, 1), -1.27 d, and from the base's own
    moments, -.31 d."""
    exact, d = base.tilt(reward(base.points)), 0.01
    z = (base.points - exact.mean) ** 2 / 2
    up, down = (exact.tilt(sign * d * z) for sign in (1, -1))
    after = [score_round(q, base, reward, 1.0, *reference).variance for q in (up, down)]
    assert (after[0] - after[1]) / (up.variance - down.variance) == pytest.approx(multiplier, abs=5e-3)
    assert np.mean(after) == pytest.approx(exact.variance, abs=1e-4)


@pytest.mark.slow
def test_rounds_by_scores_do_not_see_the_weights_of_modes() -> None:
    """The log odds of modes at -1.5 and 1.5 that are wrong by some are still wrong by 96 % of it after an exact round."""
    odds, exact = [], TWO_MODES.tilt(np.tanh(TWO_MODES.points))
    for sign in (1, -1):
        q = exact.tilt(sign * 0.1 * np.sign(exact.points))
        after = score_round(q, TWO_MODES, np.tanh, 1.0, 0.0, TWO_MODES.variance)
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


def test_control_without_noise_shifts_too_far() -> None:
    assert deterministic_control(NORMAL, line, 1.0).mean == pytest.approx(math.pi / 2, abs=1e-5)


def test_control_without_noise_leaves_a_gap_between_modes() -> None:
    """Two paths that start together and are worth the same end at either side of it."""
    law = deterministic_control(TWO_MODES, np.tanh, 1.0)
    assert (law.expectation(np.tanh), law.positive) == pytest.approx((0.689, 0.908), abs=2e-3)
    empty = law.points[(law.log_density < -30) & (np.abs(law.points) < 2)]
    assert (empty[0], empty[-1]) == pytest.approx((-1.87, 0.83), abs=0.06)


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
    assert (law.expectation(np.tanh), law.positive) == pytest.approx((np.tanh(y).mean(), (y > 0).mean()), abs=5e-3)
