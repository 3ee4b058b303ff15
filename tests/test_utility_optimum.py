"""Optima of utilities by quadrature: known numbers of published experiments, stationarity, and no other law that is better."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit

from tiltflow.laws.law import Array
from tiltflow.laws.utility_optimum import (
    kl,
    of_cvar,
    of_entropic_risk,
    of_entropy,
    of_log_barrier,
    of_mean_variance,
    of_superquantile,
    tilted,
)


def best_share(masses: Array, rewards: Array, share: float) -> float:
    """Mean of the best share: another way to write it than the library's."""
    order = np.argsort(-rewards)
    ends = np.cumsum(masses[order]).clip(max=share)
    return float(np.diff(ends, prepend=0) @ rewards[order]) / share


# ---- published experiments, on a normal base: the reward depends on one coordinate ----

X = np.linspace(-8, 8, 80_001)
NORMAL = np.exp(-(X**2) / 2) / np.exp(-(X**2) / 2).sum()
SPIKES = sum(560 * np.exp(-((X - c) ** 2) / (2 * 0.08**2)) for c in 3.65 + 0.75 * np.arange(5))
SEEK = 40 + 15 * expit(-(X + 1.5) / 0.25) - 30 * expit((X - 1.5) / 0.25) + SPIKES
STRIPES = sum(300 * np.exp(-((X - c) ** 2) / (2 * 0.08**2)) for c in 2.9 + 0.5 * np.arange(5))
COST = 90 + 170 * expit((X + 1.5) / 0.25) - 220 * expit((X - 2.5) / 0.25) + STRIPES


def sought(p: Array) -> list[float]:
    return [float(p @ SEEK), best_share(p, SEEK, 0.01), float(p[X < -1.5].sum()), float(p[X > 3].sum())]


def near(found: list[float], printed: list[str]) -> None:
    """To half of the last digit that is printed."""
    for value, text in zip(found, printed, strict=True):
        assert value == pytest.approx(float(text), abs=0.501 * 10.0 ** -len(text.partition(".")[2])), (found, printed)


@pytest.mark.parametrize(
    ("alpha", "printed"),
    [
        (math.inf, ["38.78", "59.94", ".067", ".0013"]),
        (0.666, ["569.7", "570.0", "0", "1"]),
        (5, ["567.5", "570.0", "0", "1"]),
        (20, ["559.7", "570.0", "0", "1"]),
        (60, ["141.4", "570.0", ".065", ".206"]),
        (100, ["43.95", "510.2", ".075", ".0109"]),
        (200, ["39.44", "98.2", ".071", ".0021"]),
        (500, ["38.95", "66.4", ".069", ".0015"]),
        (1000, ["38.86", "62.5", ".068", ".0014"]),
    ],
)
def test_the_mean_seeks_extremes_only_where_it_is_cheap(alpha: float, printed: list[str]) -> None:
    near(sought(tilted(NORMAL, SEEK / alpha)), printed)


@pytest.mark.parametrize(
    ("alpha", "printed"),
    [
        (20, ["44.09", "569.9", ".066", ".0113"]),
        (100, ["44.08", "569.5", ".066", ".0113"]),
        (500, ["44.05", "567.5", ".066", ".0113"]),
        (1000, ["44.02", "565.0", ".066", ".0113"]),
        (5000, ["43.78", "543.0", ".066", ".0112"]),
    ],
)
def test_the_superquantile_seeks_extremes_at_any_price(alpha: float, printed: list[str]) -> None:
    best = of_superquantile(NORMAL, SEEK, 0.01, alpha)
    near(sought(best.masses), printed)
    assert best.value == pytest.approx(best_share(best.masses, SEEK, 0.01) - alpha * kl(best.masses, NORMAL), rel=1e-10)


def avoided(p: Array) -> list[float]:
    return [float(p @ COST), best_share(p, COST, 0.01), float(p[X < -1].sum()), float(p[X > 2].sum())]


def test_the_mean_does_not_avoid_catastrophes() -> None:
    near(avoided(NORMAL), ["243.4", "268.1", ".159", ".023"])
    near(avoided(tilted(NORMAL, -COST / 20)), ["103.2", "251.5", ".876", ".116"])
    near(avoided(tilted(NORMAL, -COST / 30)), ["126.9", "259.9", ".827", ".082"])


@pytest.mark.parametrize(
    ("alpha", "threshold", "printed"),
    [(20, "102.8", ["94.4", "103.0", ".962", ".038"]), (30, "109.42", ["97.2", "109.72", ".969", ".031"])],
)
def test_the_cvar_avoids_catastrophes(alpha: float, threshold: str, printed: list[str]) -> None:
    """At 30 a grid of thresholds 0.5 apart has its best at 109.5, with a CVaR of 109.8; the best of all is 109.42."""
    best = of_cvar(NORMAL, -COST, 0.01, alpha)
    near([-best.parameter, *avoided(best.masses)], [threshold, *printed])
    assert best.value == pytest.approx(-avoided(best.masses)[1] - alpha * kl(best.masses, NORMAL), rel=1e-10)


def test_the_cvar_stays_at_the_base_where_it_is_dear_and_hides_between_stripes_where_it_is_cheap() -> None:
    assert avoided(of_cvar(NORMAL, -COST, 0.01, 50).masses)[1] == pytest.approx(259.9, abs=0.1)
    for alpha, most in ((1, 41), (5, 49)):
        best = avoided(of_cvar(NORMAL, -COST, 0.01, alpha).masses)
        assert best[3] == pytest.approx(1, abs=1e-6)
        assert 40 < best[1] < most


def test_the_tilt_by_the_distance_to_the_origin() -> None:
    """N((20.75, 20.75), 2.94^2 I) under r = |x|: E r 29.49, and 35.09 at the temperature 1.538, shifted by (3.96, 3.96)."""
    axis = np.linspace(-8, 8, 201)
    x, y = (20.75 + 2.94 * each for each in np.meshgrid(axis, axis))
    base = np.exp(-((x - 20.75) ** 2 + (y - 20.75) ** 2) / (2 * 2.94**2)).ravel()
    r = np.hypot(x, y).ravel()
    p = tilted(base / base.sum(), r / 1.538)
    near(
        [float(base @ r / base.sum()), float(p @ r), float(p @ x.ravel()) - 20.75, float(p @ y.ravel()) - 20.75],
        ["29.49", "35.09", "3.96", "3.96"],
    )


# ---- entropy ----


def test_the_most_spread_law_near_a_gaussian() -> None:
    """Variance (1 + alpha) / alpha times that of the base: its entropy rises by 1.10 nats in two dimensions at alpha = 0.5."""
    axis = np.linspace(-16, 16, 161)
    x, y = np.meshgrid(axis, axis)
    base, cell = np.exp(-(x**2) / 2 - y**2 / (2 * 0.8**2)).ravel(), (axis[1] - axis[0]) ** 2
    base /= base.sum()
    best = of_entropy(base, cell, 0.5)
    assert best.masses @ x.ravel() ** 2 == pytest.approx(3.0, rel=1e-8)
    assert best.masses @ y.ravel() ** 2 == pytest.approx(3 * 0.64, rel=1e-8)

    def entropy(p: Array) -> float:
        return -float(p @ np.log(p / cell))

    assert entropy(best.masses) - entropy(base) == pytest.approx(math.log(3), rel=1e-8)
    assert round(math.log(3), 2) == 1.10
    assert best.value == pytest.approx(entropy(best.masses) - 0.5 * kl(best.masses, base), rel=1e-12)
    with pytest.raises(ValueError, match="no optimum"):
        of_entropy(base, cell, 0.0)


# ---- stationary, and the best of all ----

BASE = np.array([0.0, 0.55, 0.3, 0.15])
REWARDS, COSTS, CELLS = np.array([3.0, -1.0, 0.4, 1.9]), np.array([-1.0, 0.2, -0.3, 0.9]), np.array([1.0, 0.6, 1.7, 0.8])
SIMPLEX = [np.array([0, i, j, 40 - i - j]) / 40 for i in range(41) for j in range(41 - i)]
"""Laws on the three points that the base can reach."""


def entropic(p: Array, risk: float) -> float:
    return math.log(float(p @ np.exp(risk * REWARDS))) / risk


def variance(p: Array) -> float:
    return float(p @ REWARDS**2 - (p @ REWARDS) ** 2)


def log_risk(p: Array, risk: float) -> Array:
    return np.asarray(np.exp(risk * (REWARDS - entropic(p, risk))) / risk)


LIMIT = float(BASE @ COSTS) + 0.1
UTILITIES = {
    "superquantile": (lambda p: best_share(p, REWARDS, 0.3), lambda a: of_superquantile(BASE, REWARDS, 0.3, a), None),
    "cvar": (lambda p: -best_share(p, -REWARDS, 0.3), lambda a: of_cvar(BASE, REWARDS, 0.3, a), None),
    "mean-variance": (
        lambda p: float(p @ REWARDS) - 0.5 * variance(p),
        lambda a: of_mean_variance(BASE, REWARDS, 0.5, a),
        lambda p: REWARDS - 0.5 * (REWARDS - p @ REWARDS) ** 2,
    ),
    "mean-plus-variance": (
        lambda p: float(p @ REWARDS) + 0.2 * variance(p),
        lambda a: of_mean_variance(BASE, REWARDS, -0.2, a),
        lambda p: REWARDS + 0.2 * (REWARDS - p @ REWARDS) ** 2,
    ),
    "seeks risk": (
        lambda p: entropic(p, 0.7),
        lambda a: of_entropic_risk(BASE, REWARDS, 0.7, a),
        lambda p: log_risk(p, 0.7),
    ),
    "avoids risk": (
        lambda p: entropic(p, -0.7),
        lambda a: of_entropic_risk(BASE, REWARDS, -0.7, a),
        lambda p: log_risk(p, -0.7),
    ),
    "log-barrier": (
        lambda p: float(p @ REWARDS) + 0.3 * math.log(max(LIMIT - p @ COSTS, 1e-300)),
        lambda a: of_log_barrier(BASE, REWARDS, COSTS, LIMIT, 0.3, a),
        lambda p: REWARDS - 0.3 * COSTS / (LIMIT - p @ COSTS),
    ),
    "entropy": (
        lambda p: -kl(p, CELLS),
        lambda a: of_entropy(BASE, CELLS, a),
        lambda p: np.concatenate([[0.0], -np.log(p[1:] / CELLS[1:])]),
    ),
}


@pytest.mark.parametrize("name", UTILITIES)
@pytest.mark.parametrize("alpha", [0.3, 3.0])
def test_an_optimum_is_stationary_and_no_law_is_better(name: str, alpha: float) -> None:
    """log p / q = dF / alpha up to a constant; and of all laws on a grid none comes higher."""
    utility, solve, slope = UTILITIES[name]
    best = solve(alpha)
    assert best.value == pytest.approx(utility(best.masses) - alpha * kl(best.masses, BASE), abs=1e-9)
    if slope is not None:
        misfit = (np.log(best.masses[1:] / BASE[1:]) - slope(best.masses)[1:] / alpha).std()
        assert misfit < 1e-7
    values = [utility(p) - alpha * kl(p, BASE) for p in SIMPLEX]
    assert best.value - 0.03 < max(values) <= best.value + 1e-12


def test_a_tilt_of_a_point_that_the_base_has_not() -> None:
    assert tilted(np.array([0.0, 1.0]), np.array([1e4, 0.0])).tolist() == [0, 1]


def test_a_limit_that_nothing_meets() -> None:
    with pytest.raises(ValueError, match="no law costs less"):
        of_log_barrier(BASE, REWARDS, COSTS, COSTS[BASE > 0].min(), 0.3, 1.0)
