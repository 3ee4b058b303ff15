"""Thresholds of tails, against minimisation by brute force, duality, and the tilted law that they name."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import logsumexp

from tiltflow.laws.law import Array
from tiltflow.laws.tail_duals import lower_log_tilt, lower_threshold, upper_log_tilt, upper_threshold


def some_law(seed: int, points: int = 40) -> tuple[Array, Array]:
    """Probabilities and rewards, some of which are equal, and some points without probability."""
    draw = np.random.default_rng(seed)
    masses = draw.dirichlet(np.ones(points))
    masses[:3] = 0
    return masses / masses.sum(), np.round(draw.normal(size=points) * 3, 1)


def upper_dual(t: Array, masses: Array, rewards: Array, share: float, alpha: float) -> Array:
    excess = np.maximum(rewards - t[:, None], 0)
    return np.asarray(t + alpha * logsumexp(excess / (alpha * share), b=masses, axis=1))


def lower_dual(t: Array, masses: Array, rewards: Array, share: float, alpha: float) -> Array:
    shortfall = np.maximum(t[:, None] - rewards, 0)
    return np.asarray(t + alpha * logsumexp(-shortfall / (alpha * share), b=masses, axis=1))


CASES = [(seed, share, alpha) for seed in range(6) for share in (0.02, 0.3, 0.9) for alpha in (0.1, 1.0, 30.0)]


@pytest.mark.parametrize(("seed", "share", "alpha"), CASES)
def test_the_upper_threshold_is_the_minimum(seed: int, share: float, alpha: float) -> None:
    masses, rewards = some_law(seed)
    t = upper_threshold(masses, rewards, share, alpha)
    around = np.concatenate([np.linspace(rewards.min() - 1, rewards.max() + 1, 500), t + np.linspace(-1e-3, 1e-3, 100)])
    found = upper_dual(np.array([t]), masses, rewards, share, alpha)[0]
    assert found <= upper_dual(around, masses, rewards, share, alpha).min() + 1e-12


@pytest.mark.parametrize(("seed", "share", "alpha"), CASES)
def test_the_lower_threshold_is_the_maximum_of_all(seed: int, share: float, alpha: float) -> None:
    masses, rewards = some_law(seed)
    t = np.array([lower_threshold(masses, rewards, share, alpha)])
    around = np.linspace(rewards.min() - 1, rewards.max() + 1, 2000)
    found = lower_dual(t, masses, rewards, share, alpha)[0]
    assert found >= lower_dual(around, masses, rewards, share, alpha).max() - 1e-12


def test_above_the_upper_threshold_lies_the_share_of_the_tilted_law() -> None:
    """Where it is not itself a value of the reward: to the precision of the exponent, up to 2e7, whose exp no float holds."""
    for scale in (1.0, 1e4):
        masses = np.full(1000, 1e-3)
        rewards = scale * np.linspace(0, 1, 1000) ** 9
        for share, alpha in ((0.05, 1.0), (0.3, 20.0), (0.005, 0.1)):
            t = upper_threshold(masses, rewards, share, alpha)
            logs = upper_log_tilt(rewards, t, share, alpha)
            above = np.exp(logsumexp(logs[rewards > t], b=masses[rewards > t]) - logsumexp(logs, b=masses))
            at = np.isclose(rewards, t, rtol=1e-13, atol=0)
            assert at.any() or above == pytest.approx(share, rel=1e-12 + 4e-16 * scale / (alpha * share))


def test_beside_the_lower_threshold_lies_the_share_of_the_tilted_law() -> None:
    masses, rewards = some_law(3, 400)
    t = lower_threshold(masses, rewards, 0.1, 2.0)
    p = masses * np.exp(lower_log_tilt(rewards, t, 0.1, 2.0))
    p /= p.sum()
    assert p[rewards < t].sum() <= 0.1 <= p[rewards <= t].sum()


def test_the_lower_dual_has_maxima_that_are_not_the_largest() -> None:
    """Two rewards, three quarters of the law at the low one: at a small price the law moves to the high one; at a large price
    it stays. Both are maxima of the dual, and the values of both decide."""
    masses, rewards = np.array([0.75, 0.25]), np.array([0.0, 1.0])
    for alpha in (0.1, 10.0):
        values = lower_dual(np.array([0.0, 1.0]), masses, rewards, 0.5, alpha)
        assert lower_threshold(masses, rewards, 0.5, alpha) == float(np.argmax(values))
    assert lower_threshold(masses, rewards, 0.5, 0.1) == 1.0
    assert lower_threshold(masses, rewards, 0.5, 10.0) == 0.0


def test_rewards_that_are_all_equal() -> None:
    masses, rewards = np.full(4, 0.25), np.full(4, 2.0)
    assert upper_threshold(masses, rewards, 0.1, 1.0) == 2.0
    assert lower_threshold(masses, rewards, 0.1, 1.0) == 2.0
