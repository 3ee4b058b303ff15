"""Temperatures, effective sample sizes and achieved tilts on the line, against closed forms and known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lines import NARROW, NORMAL, TWO_MODES, bowl, hill, line

from tiltflow.laws.tilted_law import (
    achieved_tilt,
    effective_share,
    replay,
    step_of_effective_share,
    temperature_of_kl,
    tilted,
)

# ---- temperatures ----


@pytest.mark.parametrize(
    ("kl", "narrow", "two_modes", "reward"),
    [
        (0.01, 3.489973, 6.137367, 0.12315),
        (0.05, 1.292389, 2.690226, 0.27356),
        (0.1, 0.781882, 1.852511, 0.38363),
        (0.5, 0.151660, 0.603303, 0.79205),
    ],
)
def test_the_temperature_of_a_kl(kl: float, narrow: float, two_modes: float, reward: float) -> None:
    assert temperature_of_kl(NARROW, hill, kl) == pytest.approx(narrow, abs=2e-6)
    assert temperature_of_kl(TWO_MODES, np.tanh, kl) == pytest.approx(two_modes, abs=2e-6)
    assert tilted(TWO_MODES, np.tanh, two_modes).expectation(np.tanh) == pytest.approx(reward, abs=1e-5)


def test_the_temperature_of_a_kl_under_a_linear_reward() -> None:
    """KL = 1 / (2 beta^2) on N(0, 1), in whatever unit the reward is."""
    for scale in (1.0, 1e-3, 1e3):
        beta = temperature_of_kl(NORMAL, lambda x, s=scale: s * x, 0.08)  # type: ignore[misc]
        assert beta == pytest.approx(scale * 2.5, rel=1e-7)


def test_the_kl_rises_with_the_inverse_temperature() -> None:
    """d KL / d eta = eta Var(r); 1.80 and .90 are its logarithmic slopes at KL .1 and .5."""
    for kl, expected in ((0.1, 1.80), (0.5, 0.90)):
        eta, step = 1 / temperature_of_kl(TWO_MODES, np.tanh, kl), 1e-4
        up, here, down = (tilted(TWO_MODES, np.tanh, 1 / each) for each in (eta + step, eta, eta - step))
        variance = here.expectation(lambda x: np.tanh(x) ** 2) - here.expectation(np.tanh) ** 2
        assert (up.kl(TWO_MODES) - down.kl(TWO_MODES)) / (2 * step) == pytest.approx(eta * variance, rel=1e-5)
        assert eta**2 * variance / kl == pytest.approx(expected, abs=5e-3)


def test_a_kl_that_no_temperature_has() -> None:
    with pytest.raises(ValueError, match="the same everywhere"):
        temperature_of_kl(NORMAL, np.zeros_like, 0.1)
    with pytest.raises(ValueError, match="almost nothing"):
        temperature_of_kl(NORMAL, bowl, 20.0)


# ---- how much of the tilt ----


@pytest.mark.parametrize("eta", [0.3, 1.0, 2.5])
def test_a_tilt_has_all_of_itself(eta: float) -> None:
    law = TWO_MODES.tilt(eta * np.tanh(TWO_MODES.points))
    assert achieved_tilt(law, TWO_MODES, np.tanh, 1 / eta) == pytest.approx((1, 1))
    assert achieved_tilt(law, TWO_MODES, np.tanh, 2.0) == pytest.approx((2 * eta, 1))


def test_the_tilt_of_a_shift_that_the_reward_explains_in_part() -> None:
    """N(a, 1) over N(0, 1) is a tilt by a x, of which z + c z^2 explains 1 / (1 + 2 c^2), z = x - a."""
    a, c = 0.4, 0.5
    law = NORMAL.tilt(a * NORMAL.points)
    slope, r2 = achieved_tilt(law, NORMAL, lambda x: (x - a) + c * (x - a) ** 2, 1.0)
    assert slope == pytest.approx(a / (1 + 2 * c**2), abs=1e-9)
    assert r2 == pytest.approx(1 / (1 + 2 * c**2), abs=1e-9)


# ---- effective sample sizes ----


@pytest.mark.parametrize(
    ("eta", "shares"),
    [
        (1.0, [0.6639]),
        (1.0, [0.8550, 0.9048]),
        (1.0, [0.9559, 0.9611, 0.9682, 0.9755]),
        (1 / 0.3, [0.4592]),
        (1 / 0.3, [0.5391, 0.9317]),
        (1 / 0.3, [0.7179, 0.8831, 0.9628, 0.9869]),
        (10.0, [0.4836, 0.9515, 0.9754, 0.9820]),
    ],
)
def test_the_effective_shares_of_equal_rounds(eta: float, shares: list[float]) -> None:
    step, r = eta / len(shares), np.tanh(TWO_MODES.points)
    found = [effective_share(TWO_MODES.tilt(k * step * r), step * r) for k in range(len(shares))]
    assert found == pytest.approx(shares, abs=6e-5)


def test_effective_shares_of_gaussians() -> None:
    """exp(-h^2 S) of a linear reward, sqrt(1 + 2 h) / (1 + h) of a bowl on N(0, 1)."""
    assert effective_share(NARROW, 0.8 * NARROW.points) == pytest.approx(math.exp(-0.64 / 4), abs=1e-7)
    assert effective_share(NORMAL, 1e4 + bowl(NORMAL.points)) == pytest.approx(math.sqrt(3) / 2, abs=1e-7)


def test_the_step_of_an_effective_share() -> None:
    """exp(-h^2) = .7 on N(0, 1), where so long a step is allowed."""
    assert step_of_effective_share(NORMAL, line, 0.7, 2.0) == pytest.approx(math.sqrt(-math.log(0.7)), abs=1e-8)
    assert step_of_effective_share(NORMAL, line, 0.7, 0.5) == 0.5


@pytest.mark.parametrize(
    ("drawn", "share", "largest"),
    [([0.0], 0.6639, None), ([0.75], 0.9755, None), ([0.0, 0.5], 0.7914, None), ([0.0, 0.25, 0.5, 0.75], 0.8464, 1.41)],
)
def test_the_replay_of_rounds(drawn: list[float], share: float, largest: float | None) -> None:
    found = replay(TWO_MODES, np.tanh, drawn, 1.0)
    assert found[0] == pytest.approx(share, abs=6e-5)
    assert largest is None or found[1] == pytest.approx(largest, abs=6e-3)
    if len(drawn) == 1:
        before = TWO_MODES.tilt(drawn[0] * np.tanh(TWO_MODES.points))
        assert found[0] == pytest.approx(effective_share(before, (1 - drawn[0]) * np.tanh(TWO_MODES.points)))
