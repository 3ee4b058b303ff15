"""The law of a control from a time on: closed forms on Gaussians, known values on two modes, the rates of its rounds."""

from __future__ import annotations

import numpy as np
import pytest

from tiltflow.laws.late_control import late_control
from tiltflow.laws.law import Array, Law, log_normal
from tiltflow.problems.two_modes import TwoModes


def gaussian(mean: float, variance: float) -> Law:
    return Law.of(lambda x: log_normal(x, mean, variance**0.5))


def bent(x: Array) -> Array:
    return 1.7 * x - 1.5 * x**2


@pytest.mark.parametrize(
    ("time", "mean", "variance"),
    [(0.25, 0.643750, 0.142883), (0.5, 0.650000, 0.144531), (0.75, 0.675000, 0.176758), (0.9, 0.695455, 0.233632)],
)
def test_one_round_on_a_gaussian(time: float, mean: float, variance: float) -> None:
    """N(0.7, 0.25) under 1.7 x - 1.5 x^2: with w = Var[X_1 | x_t], mean (m + w c) / (1 + q w) and variance
    w / (1 + q w) + (S - w) / (1 + q w)^2. The tilt is N(0.642857, 0.142857)."""
    w = 0.25 * (1 - time) ** 2 / (0.25 * time**2 + (1 - time) ** 2)
    assert ((0.7 + 1.7 * w) / (1 + 3 * w), w / (1 + 3 * w) + (0.25 - w) / (1 + 3 * w) ** 2) == pytest.approx(
        (mean, variance), abs=5.1e-7
    )
    law = late_control(gaussian(0.7, 0.25), bent, 1.0, time)
    assert (law.mean, law.variance) == pytest.approx((mean, variance), abs=1e-6)


@pytest.mark.parametrize(("time", "shift"), [(0.25, 0.9), (0.5, 0.5), (0.75, 0.1), (0.9, 1 / 82), (0.999, 1 / 998_002)])
def test_part_of_a_linear_tilt_is_reached(time: float, shift: float) -> None:
    """N(0, 1) under x: the shift is Var[X_1 | x_t], where 1 was asked for; at a temperature in its proportion. The variance
    stays 1, also where the noise that is left is less than the spacing of the grid."""
    for beta in (1.0, 0.5):
        law = late_control(gaussian(0, 1), lambda x: x, beta, time)
        assert (law.mean, law.variance) == pytest.approx((shift / beta, 1), abs=2.1e-6)


@pytest.mark.parametrize(("time", "rate"), [(0.25, 1 / 64), (0.5, 1 / 8), (0.75, 9 / 16)])
def test_rounds_converge_to_the_tilt_at_their_rate(time: float, rate: float) -> None:
    base = gaussian(0.7, 0.25)
    tilt = base.tilt(bent(base.points))
    away = [abs(late_control(base, bent, 1.0, time, rounds=n).mean - tilt.mean) for n in (1, 2, 3)]
    assert away[1] / away[0] == pytest.approx(rate, rel=1e-3)
    assert away[2] / away[1] == pytest.approx(rate, rel=1e-2)
    assert late_control(base, bent, 1.0, time, rounds=40).w2(tilt) < 1e-5


@pytest.mark.parametrize(
    ("time", "rewards"),
    [
        (0.3, {1: 0.47664, 2: 0.58366, 5: 0.61644}),
        (0.5, {1: 0.17640, 2: 0.29998, 5: 0.49863, 10: 0.59402}),
    ],
)
def test_modes_are_chosen_before_the_middle(time: float, rewards: dict[int, float]) -> None:
    """Two modes under tanh x, whose tilt has the mean reward 0.61689."""
    problem = TwoModes()
    for rounds, reward in rewards.items():
        law = late_control(problem.law(), problem.reward_at, 1.0, time, rounds=rounds)
        assert law.expectation(problem.reward_at) == pytest.approx(reward, abs=5e-5)


def test_far_modes_keep_their_weights() -> None:
    base = Law.of(lambda x: np.logaddexp(log_normal(x, -4, 0.5), log_normal(x, 4, 0.5)))
    law = late_control(base, lambda x: x / 4, 1.0, 0.5, rounds=5)
    assert base.tilt(base.points / 4).positive == pytest.approx(0.88080, abs=1e-5)
    assert law.positive < 0.51
