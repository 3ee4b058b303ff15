"""Functionals of laws on a grid: slopes against their change, values and best laws against closed forms of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tiltflow.laws import functionals
from tiltflow.laws.functionals import Functional, Grid, least_multiplier, maximum, misfit, weighted
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

LINE = Grid((np.linspace(-9, 9, 1201),))
X = LINE.axes[0]


def normal(mean: float = 0.0, variance: float = 1.0) -> Array:
    return tilted(np.ones_like(X), -((X - mean) ** 2) / (2 * variance))


Q, P = normal(), normal(0.4, 1.7)
COST = X**2 / 2


def twice_over(cost: Array) -> Array:
    return np.asarray(np.maximum(0, cost - 0.5) ** 2)


FUNCTIONALS: dict[str, Functional] = {
    "mean": functionals.mean(X),
    "mean-variance": functionals.mean_variance(X, 0.7),
    "entropic-risk": functionals.entropic_risk(X, -0.8),
    "log-barrier": functionals.log_barrier(X, COST, 2.0, 0.4),
    "best": functionals.best_share(X, 0.2),
    "worst": functionals.worst_share(X, 0.3),
    "penalised": functionals.penalised(X, twice_over, COST, samples=False),
    "penalised samples": functionals.penalised(X, twice_over, COST, samples=True),
    "entropy": functionals.entropy(LINE.cell),
    "kl": functionals.minus_kl(Q),
    "renyi": functionals.minus_renyi(Q, 0.5),
    "renyi 2": functionals.minus_renyi(Q, 1.3),
    "wasserstein-1": functionals.minus_wasserstein_1(X, Q),
    "wasserstein-2": functionals.minus_wasserstein_2(X, Q),
    "mmd": functionals.minus_mmd(LINE, Q, 0.8),
    "energy": functionals.minus_mmd(LINE, Q, None),
    "log-determinant": functionals.optimal_design(np.stack([X, X**2], 1), "log-determinant", 1e-3),
    "trace": functionals.optimal_design(np.stack([X, X**2], 1), "trace", 1e-3),
    "eigenvalue": functionals.optimal_design(np.stack([X, X**2], 1), "eigenvalue", 1e-3),
    "sum": weighted([(2.0, functionals.mean(X)), (0.3, functionals.entropy(LINE.cell))]),
}


@pytest.mark.parametrize("name", FUNCTIONALS)
def test_the_slope_is_the_change_of_the_value(name: str) -> None:
    """F((1 - e) p + e q) = F(p) + e (E_q dF - E_p dF): central differences, of laws that are positive everywhere."""
    functional, small = FUNCTIONALS[name], 1e-4
    other = normal(-0.8, 0.9)
    ahead, back = (functional.value(P + e * (other - P)) for e in (small, -small))
    expected = float((other - P) @ functional.slope(P))
    # thresholds and quantiles are interpolated between points 0.015 apart
    assert (ahead - back) / (2 * small) == pytest.approx(expected, rel=2e-4, abs=1e-6)


def test_values_of_normal_laws() -> None:
    """N(0.4, 1.7) beside N(0, 1)."""
    m, v = 0.4, 1.7

    def value(name: str, p: Array = P) -> float:
        return FUNCTIONALS[name].value(p)

    assert value("mean-variance") == pytest.approx(m - 0.7 * v)
    assert value("entropic-risk") == pytest.approx(m - 0.8 * v / 2)
    assert value("log-barrier") == pytest.approx(m + 0.4 * math.log(2 - (v + m**2) / 2))
    quantile, density = 0.8416212335729143, 0.2799619204391606  # of N(0, 1) at 0.8
    assert value("best") == pytest.approx(m + math.sqrt(v) * density / 0.2, abs=1e-4)
    assert quantile < density / 0.2
    assert value("penalised") == pytest.approx(m - ((v + m**2) / 2 - 0.5) ** 2)
    assert value("entropy") == pytest.approx((1 + math.log(2 * math.pi * v)) / 2)
    assert value("kl") == pytest.approx(-(v + m**2 - 1 - math.log(v)) / 2)
    for name, b in (("renyi", 0.5), ("renyi 2", 1.3)):
        mixed = (1 - b) * v + b
        log_ratio = math.log(mixed / v ** (1 - b)) / (2 * (b - 1))
        assert value(name) == pytest.approx(-(b * m**2 / (2 * mixed) - log_ratio), rel=1e-7)
    assert value("wasserstein-1", normal(0.7)) == pytest.approx(-0.7, rel=1e-6)
    assert value("wasserstein-2") == pytest.approx(-(m**2 + (math.sqrt(v) - 1) ** 2), rel=1e-3)
    h = 0.8**2

    def kernel_mean(variance: float, mean: float) -> float:
        return math.sqrt(h / (h + variance)) * math.exp(-(mean**2) / (2 * (h + variance)))

    assert value("mmd") == pytest.approx(2 * kernel_mean(1 + v, m) - kernel_mean(2 * v, 0) - kernel_mean(2, 0))

    def distance(variance: float, mean: float) -> float:
        s = math.sqrt(variance)
        return s * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * variance)) + mean * math.erf(mean / s / math.sqrt(2))

    energy = distance(2 * v, 0) + distance(2, 0) - 2 * distance(1 + v, m)
    assert value("energy") == pytest.approx(energy, rel=1e-4)
    moments = np.array([[v + m**2, m**3 + 3 * m * v], [m**3 + 3 * m * v, m**4 + 6 * m**2 * v + 3 * v**2]]) + 1e-3 * np.eye(2)
    assert value("log-determinant") == pytest.approx(np.linalg.slogdet(moments)[1])
    assert value("trace") == pytest.approx(-np.trace(np.linalg.inv(moments)))
    assert value("eigenvalue") == pytest.approx(np.linalg.eigvalsh(moments)[0])
    assert value("sum") == pytest.approx(2 * m + 0.3 * value("entropy"))


ALONE: dict[str, tuple[Functional, float, Callable[[float], Array]]] = {
    "mean-variance": (FUNCTIONALS["mean-variance"], 1.3, lambda a: of_mean_variance(Q, X, 0.7, a).masses),
    "entropic-risk": (FUNCTIONALS["entropic-risk"], 1.3, lambda a: of_entropic_risk(Q, X, -0.8, a).masses),
    "log-barrier": (FUNCTIONALS["log-barrier"], 1.3, lambda a: of_log_barrier(Q, X, COST, 2.0, 0.4, a).masses),
    "best": (FUNCTIONALS["best"], 3.0, lambda a: of_superquantile(Q, X, 0.2, a).masses),
    "worst": (FUNCTIONALS["worst"], 3.0, lambda a: of_cvar(Q, X, 0.3, a).masses),
    "entropy": (FUNCTIONALS["entropy"], 1.3, lambda a: of_entropy(Q, LINE.cell, a).masses),
}


@pytest.mark.parametrize("name", ALONE)
def test_the_fixed_point_is_the_closed_form(name: str) -> None:
    functional, alpha, closed = ALONE[name]
    # of tails: thresholds at points, and between them
    assert np.abs(maximum(Q, functional, alpha) - closed(alpha)).sum() < (0.02 if name in ("best", "worst") else 1e-7)


def moments(p: Array) -> tuple[float, float]:
    m = float(p @ X)
    return m, float(p @ (X - m) ** 2)


MIXED: dict[str, tuple[list[tuple[float, str]], float, tuple[float, float]]] = {
    # E x - w KL: a tilt at alpha + w
    "kl": ([(1.0, "mean"), (0.8, "kl")], 1.2, (0.5, 1.0)),
    # p proportional to q^(a / (a + w)) exp(x / (a + w))
    "entropy": ([(1.0, "mean"), (0.5, "entropy")], 1.0, (1.0, 1.5)),
    # p proportional to q exp((1 - w) x / a): the potential of a shift is x
    "wasserstein-1": ([(1.0, "mean"), (0.4, "wasserstein-1")], 1.0, (0.6, 1.0)),
    # m - w m^2 - a m^2 / 2
    "wasserstein-2": ([(1.0, "mean"), (0.5, "wasserstein-2")], 1.0, (0.5, 1.0)),
}


@pytest.mark.parametrize("name", MIXED)
def test_best_laws_of_sums_are_normal(name: str) -> None:
    parts, alpha, expected = MIXED[name]
    found = maximum(Q, weighted([(weight, FUNCTIONALS[each]) for weight, each in parts]), alpha)
    # a map between quantiles is interpolated between points
    assert moments(found) == pytest.approx(expected, abs=LINE.cell**2 / 4 if name == "wasserstein-2" else 1e-8)


def test_the_best_design_of_one_feature() -> None:
    """1 / v = 1 - 2 / (a (v + ridge)): a fixed point of the variance."""
    design = functionals.optimal_design(X[:, None], "log-determinant", 0.2)
    v = moments(maximum(Q, design, 4.0))[1]
    assert 1 / v == pytest.approx(1 - 2 / (4 * (v + 0.2)), rel=1e-6)


@pytest.mark.parametrize("name", ["renyi", "mmd", "energy", "wasserstein-2", "trace", "penalised", "sum"])
def test_a_best_law_is_stationary_and_better_than_its_neighbours(name: str) -> None:
    functional, alpha = weighted([(1.0, functionals.mean(X)), (1.0, FUNCTIONALS[name])]), 2.5
    p = maximum(Q, functional, alpha)
    assert misfit(p, Q, functional.slope(p), alpha) < 1e-8
    best, rng = functional.value(p) - alpha * kl(p, Q), np.random.default_rng(0)
    for _ in range(5):
        a, b, c = rng.normal(size=3)
        near = tilted(p, 0.1 * (a * np.sin(X) + b * np.cos(2 * X) + c * X))
        assert functional.value(near) - alpha * kl(near, Q) < best - 1e-6


def test_a_misfit_is_seen() -> None:
    """Of the tilt by x, as an optimum of 1.1 x: 0.1 x is left, with the standard deviation 0.1."""
    p = tilted(Q, X)
    assert misfit(p, Q, X, 1.0) < 1e-12
    assert misfit(p, Q, 1.1 * X, 1.0) == pytest.approx(0.1, rel=1e-6)
    assert misfit(p, Q, 2 * X, 2.0) < 1e-12


def test_a_multiplier_that_keeps_a_limit() -> None:
    """E x <= 0.3 of the tilt of N(0, 1) by (1 - m) x: m = 0.7; 0 where it holds without one; none below all points."""
    assert least_multiplier(Q, lambda m: (1 - m) * X, X, 0.3) == pytest.approx(0.7)
    assert least_multiplier(Q, lambda m: (1 - m) * X, X, 1.5) == 0
    with pytest.raises(ValueError, match="no multiplier is enough"):
        least_multiplier(Q, lambda m: (1 - m) * X, X, -10.0)


def test_a_law_without_an_optimum_is_none() -> None:
    """E x^2 - KL from N(0, 1) has no bound but the end of the grid; -W1 alone is not stationary away from the base."""
    edge = maximum(Q, functionals.mean(X**2), 1.0)
    assert LINE.at_the_edge(edge) > 0.1
    assert LINE.at_the_edge(Q) < 1e-15
    with pytest.raises(ValueError, match="no law was found"):
        maximum(Q, weighted([(1.0, functionals.mean(np.sin(3 * X))), (1.0, FUNCTIONALS["wasserstein-1"])]), 1.0)


def test_the_plane_is_a_product_of_lines() -> None:
    """Of the energy of a Gaussian kernel, and of points and cells."""
    plane = Grid((np.linspace(-7, 7, 71), np.linspace(-6, 6, 61)))
    points = plane.points
    assert (plane.shape, plane.cell, points.shape) == ((71, 61), pytest.approx(0.04), (4331, 2))
    q = tilted(np.ones(len(points)), -(points**2).sum(1) / 2)
    p = tilted(q, points @ np.array([0.5, -0.3]))
    h = 0.9**2

    def kernel_mean(squared: float) -> float:
        return h / (h + 2) * math.exp(-squared / (2 * (h + 2)))

    value = functionals.minus_mmd(plane, q, 0.9).value(p)
    assert value == pytest.approx(2 * kernel_mean(0.34) - 2 * kernel_mean(0), rel=1e-6)
    assert plane.at_the_edge(q) < 1e-5
