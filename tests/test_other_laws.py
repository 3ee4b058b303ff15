"""Laws of choosing among samples, of guidance and of normalised policy gradients, against closed forms and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lines import NARROW, NORMAL, TWO_MODES, bowl, hill, line

from tiltflow.laws.other_laws import best_of, guided, importance_resampled, normalised_tilts, window_fraction
from tiltflow.laws.tilted_law import achieved_tilt


@pytest.mark.parametrize(("n", "mean"), [(2, 1 / math.sqrt(math.pi)), (4, 1.02938), (8, 1.42360), (16, 1.76599), (64, 2.34373)])
def test_the_best_of_n(n: int, mean: float) -> None:
    """KL log n - (n - 1) / n whatever the reward, and the mean of the largest of n normal numbers."""
    law = best_of(NORMAL, line, n)
    assert law.mean == pytest.approx(mean, abs=2e-5)
    assert law.kl(NORMAL) == pytest.approx(math.log(n) - (n - 1) / n, abs=2e-5)
    assert best_of(TWO_MODES, np.tanh, n).kl(TWO_MODES) == pytest.approx(math.log(n) - (n - 1) / n, abs=2e-5)


def test_the_best_of_two_with_equal_rewards() -> None:
    """A bowl's best of n is nearest to 0: F = 1 - F_|x|, E x^2 of the least of two |x| is 1 - 2 / pi."""
    assert best_of(NORMAL, bowl, 2).variance == pytest.approx(1 - 2 / math.pi, abs=1e-4)


def test_the_best_of_n_is_no_tilt() -> None:
    """On a line a tilt with the same KL, N(s, 1) with s^2 / 2 of it, has more reward."""
    law = best_of(NORMAL, line, 4)
    assert achieved_tilt(law, NORMAL, line, 1.0) == pytest.approx((0.937, 0.768), abs=5e-4)
    assert (law.mean, math.sqrt(2 * law.kl(NORMAL))) == pytest.approx((1.03, 1.13), abs=5e-3)
    found = [best_of(TWO_MODES, np.tanh, n).expectation(np.tanh) for n in (2, 4, 16)]
    assert found == pytest.approx([0.46321, 0.81439, 0.97082], abs=3e-5)


@pytest.mark.parametrize(
    ("beta", "k", "reward", "slope"),
    [
        (1.0, 2, 0.30599, 0.419),
        (1.0, 4, 0.49176, 0.728),
        (1.0, 16, 0.59420, 0.944),
        (1.0, 64, 0.61161, 0.987),
        (0.3, 4, 0.76918, None),
        (0.3, 64, 0.89478, None),
    ],
)
def test_resampling_one_of_k(beta: float, k: int, reward: float, slope: float | None) -> None:
    law = importance_resampled(TWO_MODES, np.tanh, beta, k)
    assert law.expectation(np.tanh) == pytest.approx(reward, abs=1e-5)
    assert slope is None or achieved_tilt(law, TWO_MODES, np.tanh, beta)[0] == pytest.approx(slope, abs=6e-4)


def test_an_offset_of_the_reward_changes_nothing() -> None:
    laws = [importance_resampled(TWO_MODES, lambda x, c=c: c + np.tanh(x), 0.5, 4) for c in (0.0, 1e3)]  # type: ignore[misc]
    assert laws[1].probabilities == pytest.approx(laws[0].probabilities, abs=1e-9)


def test_resampling_one_of_two_exactly() -> None:
    """p(x) times the mean over x' of 2 w(x) / (w(x) + w(x'))."""
    law, w, p = importance_resampled(TWO_MODES, np.tanh, 0.5, 2), np.exp(2 * np.tanh(TWO_MODES.points)), TWO_MODES.probabilities
    assert law.probabilities == pytest.approx(p * ((2 * w[:, None] / (w[:, None] + w)) @ p), abs=1e-9)


def test_guidance_is_an_explicit_step_on_gaussians() -> None:
    law = guided(NARROW, hill, 1.0)
    assert (law.mean, law.variance) == pytest.approx((0.621620, 0.118092), abs=3e-6)
    assert achieved_tilt(guided(NORMAL, bowl, 1.0), NORMAL, bowl, 1.0)[0] == pytest.approx(math.e - 1, abs=1e-4)


def test_damped_guidance_is_exact_on_gaussians() -> None:
    law = guided(NARROW, hill, 1.0, curvature=3.0, std=0.5)
    assert (law.mean, law.variance) == pytest.approx((0.642857, 0.142857), abs=3e-6)
    assert guided(NORMAL, bowl, 1.0, curvature=1.0, std=1.0).variance == pytest.approx(0.5, abs=3e-6)


@pytest.mark.slow
def test_guidance_does_not_know_the_weights_of_modes() -> None:
    law = guided(TWO_MODES, np.tanh, 1.0)
    assert (law.expectation(np.tanh), law.positive) == pytest.approx((0.75345, 0.90472), abs=2e-5)
    law = guided(TWO_MODES, np.tanh, 1.0, curvature=1.0, std=0.5)
    assert (law.expectation(np.tanh), law.positive) == pytest.approx((0.68175, 0.87044), abs=2e-5)


def test_normalised_policy_gradients_settle_at_several_tilts_or_none() -> None:
    """eta penalty std(r) = 1. Of a bowl: variance 1 - sqrt(2) / penalty."""
    (eta,) = normalised_tilts(NORMAL, bowl, 2.0)
    assert NORMAL.tilt(eta * bowl(NORMAL.points)).variance == pytest.approx(1 - math.sqrt(2) / 2, abs=1e-8)
    assert normalised_tilts(TWO_MODES, np.tanh, 4.0) == pytest.approx([0.2959], abs=5e-5)
    assert normalised_tilts(TWO_MODES, np.tanh, 2.0) == pytest.approx([0.6704, 2.8126, 8.5858], abs=5e-5)
    assert normalised_tilts(TWO_MODES, np.tanh, 0.5) == []


@pytest.mark.parametrize(
    ("window", "whole", "weak"),
    [((0.1, 0.3), 0.92141, 0.46375), ((0.3, 0.5), 0.68966, 0.24924), ((0.5, 0.7), 0.40816, 0.12059)],
)
def test_a_window_of_noise(window: tuple[float, float], whole: float, weak: float) -> None:
    assert window_fraction(1.0, *window) == pytest.approx(whole, abs=6e-6)
    assert window_fraction(1.0, *window, 0.245) == pytest.approx(weak, abs=6e-6)
