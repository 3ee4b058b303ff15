"""The calibrated temperature: where its control settles, and the mean reward that it is told to reach."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.laws.gaussian_mixture import ExactVelocity
from tiltflow.problems.gaussian import Gaussian
from tiltflow.samplers.sampling import Sampling
from tiltflow.training.calibration import LIMIT, NEAR, Calibration, gain_at_limit, target_reward

pytestmark = pytest.mark.usefixtures("double")

BETA, VARIANCE = 2.0, 1.7


def settle(mean_reward: Callable[[float], float], target: float, steps: int = 400) -> Calibration:
    calibration = Calibration(target, BETA)
    for _ in range(steps):
        calibration.update({"reward": mean_reward(calibration.working_beta)}, 0)
    return calibration


def exact(beta: float) -> float:
    """The mean of r(x) = x under N(0, VARIANCE) exp(x / beta)."""
    return VARIANCE / beta


def test_an_exact_method_runs_at_the_target_temperature() -> None:
    assert settle(exact, exact(BETA)).working_beta == pytest.approx(BETA)


@pytest.mark.parametrize("share", [0.6, 0.8, 1.6])
def test_a_method_that_falls_short_is_moved_to_the_right_mean(share: float) -> None:
    calibration = settle(lambda beta: share * exact(beta), exact(BETA))
    assert share * exact(calibration.working_beta) == pytest.approx(exact(BETA))
    assert calibration.working_beta == pytest.approx(share * BETA)


@pytest.mark.parametrize(("share", "gain"), [(0.1, 3.0), (20.0, 1 / 3)])
def test_the_gain_is_limited_and_does_not_wind_up(share: float, gain: float) -> None:
    calibration = settle(lambda beta: share * exact(beta), exact(BETA))
    assert calibration.working_beta == pytest.approx(BETA / gain)
    before = calibration.log_gain
    calibration.update({"reward": calibration.target_reward + math.copysign(1.0, before)}, 0)
    assert abs(calibration.log_gain) == pytest.approx(abs(before) - 0.1 / BETA)


def test_target_reward_is_that_of_the_tilted_law() -> None:
    """Gaussian base, linear reward: the tilted mean is m + c s^2 / beta, by a z-test."""
    problem = Gaussian(dimension=1, mean=0.3, scale=VARIANCE**0.5, linear=0.8)
    estimate = target_reward(
        ExactVelocity(problem.base()),
        problem.reward(),
        BETA,
        lambda generator: torch.randn(2000, 1, generator=generator),
        Sampling(num_inference_steps=200),
        20_000,
    )
    expected = 0.8 * (0.3 + 0.8 * VARIANCE / BETA)
    assert 0 < estimate.standard_error < 0.02
    assert abs(estimate.value - expected) < 4 * estimate.standard_error


def test_too_few_effective_samples_are_refused() -> None:
    def draw(generator: torch.Generator) -> Tensor:
        return torch.randn(50, 1, generator=generator)

    problem = Gaussian(dimension=1, linear=1.0)
    with pytest.raises(
        InputError, match=r"calibration: 100 base samples have an effective sample size of .* Raise method.beta"
    ):
        target_reward(ExactVelocity(problem.base()), problem.reward(), 0.2, draw, Sampling(num_inference_steps=4), 100)


def test_a_gain_is_at_its_limit_from_a_little_before() -> None:
    for gain, near in ((2.97, True), (1 / 2.97, True), (2.5, False), (1 / 2.5, False), (1.0, False), (3.0, True)):
        assert gain_at_limit(gain) is near
    assert gain_at_limit(NEAR * LIMIT)
