r"""Functionals of a law on equally spaced points, with their slopes, and argmax_p F(p) - alpha KL(p | q) for any of them.

Written without samples, networks and autograd, so that what `tiltflow.utilities` estimates is held against other code. At the
optimum F - alpha KL has no slope along any law,

    log p = log q + dF(p) / alpha + a constant,

which is solved by steps of a share w of the way, log p <- (1 - w) log p + w (log q + dF(p) / alpha): mirror ascent with the
step w / alpha. The share falls where a step would lose, and rises again. Where F is concave the law is the best of all.
"""

# Mutation tests: test_functionals.py

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.signal import fftconvolve

from tiltflow.laws.law import Array
from tiltflow.laws.utility_optimum import kl, log_mean_exp, tilted

STEPS = 1000
CLOSE = 1e-9
"""Standard deviation of what the slope leaves, in nats, at which an optimum is one."""
ROUNDING = 1e-9
MOST_MULTIPLIER = 1e4
DIGITS = 10
"""To which rewards are the same: of a grid in the plane many are."""


@dataclass(frozen=True)
class Grid:
    """Equally spaced points in one or more dimensions.

    Args:
        axes: the values along each dimension.
    """

    axes: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(axis) for axis in self.axes)

    @property
    def spacing(self) -> Array:
        """Between neighbours along each dimension."""
        return np.array([axis[1] - axis[0] for axis in self.axes])

    @property
    def cell(self) -> float:
        """Volume of a point's cell."""
        return float(self.spacing.prod())

    @property
    def points(self) -> Array:
        """[n, d], the last dimension running first."""
        return np.stack([each.ravel() for each in np.meshgrid(*self.axes, indexing="ij")], 1)

    def at_the_edge(self, p: Array) -> float:
        """Mass of the outermost points."""
        inner = p.reshape(self.shape)[(slice(1, -1),) * len(self.axes)]
        return float(p.sum() - inner.sum())


@dataclass(frozen=True)
class Functional:
    """F of probabilities p [n], and its first variation dF [n] there, up to a constant."""

    value: Callable[[Array], float]
    slope: Callable[[Array], Array]


def weighted(parts: Sequence[tuple[float, Functional]]) -> Functional:
    """The sum of functionals with these weights."""
    return Functional(
        lambda p: sum(weight * each.value(p) for weight, each in parts),
        lambda p: reduce(np.add, (weight * each.slope(p) for weight, each in parts)),
    )


def mean(rewards: Array) -> Functional:
    """E r."""
    return Functional(lambda p: float(p @ rewards), lambda p: rewards)


def mean_variance(rewards: Array, aversion: float) -> Functional:
    """E r - aversion Var r."""

    def value(p: Array) -> float:
        m = float(p @ rewards)
        return m - aversion * float(p @ (rewards - m) ** 2)

    return Functional(value, lambda p: rewards - aversion * (rewards - p @ rewards) ** 2)


def entropic_risk(rewards: Array, risk: float) -> Functional:
    """log E exp(risk r) / risk."""

    def value(p: Array) -> float:
        return log_mean_exp(p, risk * rewards) / risk

    return Functional(value, lambda p: np.exp(risk * (rewards - value(p))) / risk)


def log_barrier(rewards: Array, costs: Array, limit: float, strength: float) -> Functional:
    """E r + strength log(limit - E c); minus infinity beyond the limit."""

    def value(p: Array) -> float:
        room = limit - float(p @ costs)
        return float(p @ rewards) + strength * math.log(room) if room > 0 else -math.inf

    return Functional(value, lambda p: rewards - strength / (limit - float(p @ costs)) * costs)


def penalised(rewards: Array, penalty: Callable[[Array], Array], costs: Array, *, samples: bool) -> Functional:
    """E r - penalty(E c), or E r - E penalty(c), each sample for itself."""
    if samples:
        return mean(rewards - penalty(costs))
    small = 1e-5 * (1 + float(np.abs(costs).max()))

    def slope(p: Array) -> Array:
        at = float(p @ costs)
        rise = (penalty(np.array(at + small)) - penalty(np.array(at - small))) / (2 * small)
        return np.asarray(rewards - rise * costs)

    return Functional(lambda p: float(p @ rewards) - float(penalty(np.array(float(p @ costs)))), slope)


def best_share(rewards: Array, share: float) -> Functional:
    """The mean of the best share s: that of the quantile function, linear between points, each of which stands for what is
    around it. A threshold that is one of the points would move with the law in jumps."""
    r, which = np.unique(-rewards.round(DIGITS), return_inverse=True)
    r = -r

    def levels(p: Array) -> Array:
        masses = np.bincount(which, p)
        return np.asarray(np.cumsum(masses) - masses / 2)

    def value(p: Array) -> float:
        at = levels(p)
        ends = np.concatenate([[0.0], at[at < share], [share]])
        quantiles = np.interp(ends, at, r)
        return float((quantiles[1:] + quantiles[:-1]) @ np.diff(ends)) / (2 * share)

    return Functional(value, lambda p: np.maximum(rewards - np.interp(share, levels(p), r), 0) / share)


def worst_share(rewards: Array, share: float) -> Functional:
    """The mean of the worst share: minus the best of minus r."""
    best = best_share(-rewards, share)
    return Functional(lambda p: -best.value(p), lambda p: -best.slope(p))


def entropy(cell: float) -> Functional:
    """-E log(p / cell)."""
    return Functional(lambda p: -kl(p, np.full_like(p, cell)), lambda p: -_log(p))


def minus_kl(q: Array) -> Functional:
    """-KL(p | q)."""
    return Functional(lambda p: -kl(p, q), lambda p: _log(q) - _log(p))


def minus_renyi(q: Array, order: float) -> Functional:
    """-log sum p^b q^(1 - b) / (b - 1)."""

    def log_sum(p: Array) -> float:
        return log_mean_exp(p, (order - 1) * (_log(p) - _log(q)))

    return Functional(
        lambda p: -log_sum(p) / (order - 1),
        lambda p: -order / (order - 1) * np.exp((order - 1) * (_log(p) - _log(q)) - log_sum(p)),
    )


def minus_wasserstein_1(x: Array, q: Array) -> Functional:
    """-W1(p, q) on the line: -int |P - Q| for the distribution functions, whose slope in x has the gradient sign(P - Q)."""
    h = float(x[1] - x[0])

    def slope(p: Array) -> Array:
        sign = np.sign(np.cumsum(p - q))
        return np.asarray(np.concatenate([[0.0], np.cumsum(sign[:-1])]) * h)

    return Functional(lambda p: -h * float(np.abs(np.cumsum(p - q)).sum()), slope)


def minus_wasserstein_2(x: Array, q: Array) -> Functional:
    """-W2(p, q)^2 on the line: the way of a point is to the same quantile, T(x), and the slope has the gradient -2 (x - T)."""
    h = float(x[1] - x[0])

    def away(p: Array) -> Array:
        # from either end, as 1 - P has no digits where P is near 1
        low = np.interp(np.cumsum(p) - p / 2, np.cumsum(q) - q / 2, x)
        high = np.interp(np.cumsum(p[::-1]) - p[::-1] / 2, np.cumsum(q[::-1]) - q[::-1] / 2, -x[::-1])[::-1]
        return np.asarray(x - np.where(np.cumsum(p) < 0.5, low, -high))

    def slope(p: Array) -> Array:
        gap = -2 * away(p)
        return np.asarray(np.concatenate([[0.0], np.cumsum((gap[1:] + gap[:-1]) / 2)]) * h)

    return Functional(lambda p: -float(p @ away(p) ** 2), slope)


def minus_mmd(grid: Grid, q: Array, bandwidth: float | None) -> Functional:
    """-MMD(p, q)^2 with the kernel exp(-|x - y|^2 / 2 h^2), or -|x - y| without a bandwidth h: a convolution."""
    ways = [h * np.arange(1 - n, n) for h, n in zip(grid.spacing, grid.shape, strict=True)]
    squares = sum(each**2 for each in np.meshgrid(*ways, indexing="ij"))
    kernel = -np.sqrt(squares) if bandwidth is None else np.exp(-squares / (2 * bandwidth**2))

    def witness(p: Array) -> Array:
        whole = fftconvolve((p - q).reshape(grid.shape), kernel)
        return np.asarray(whole[tuple(slice(n - 1, 2 * n - 1) for n in grid.shape)].ravel())

    return Functional(lambda p: -float((p - q) @ witness(p)), lambda p: -2 * witness(p))


def optimal_design(features: Array, criterion: Literal["log-determinant", "trace", "eigenvalue"], ridge: float) -> Functional:
    """log det M, -tr M^-1 or the least eigenvalue of M = E f f^T + ridge I, for features [n, k]."""

    def information(p: Array) -> Array:
        return np.asarray(features.T @ (p[:, None] * features) + ridge * np.eye(features.shape[1]))

    def value(p: Array) -> float:
        eigenvalues = np.linalg.eigvalsh(information(p))
        if criterion == "eigenvalue":
            return float(eigenvalues[0])
        return float(np.log(eigenvalues).sum() if criterion == "log-determinant" else -(1 / eigenvalues).sum())

    def slope(p: Array) -> Array:
        eigenvalues, vectors = np.linalg.eigh(information(p))
        along = (features @ vectors) ** 2
        if criterion == "eigenvalue":
            return np.asarray(along[:, 0])
        return np.asarray(along @ eigenvalues ** (-1.0 if criterion == "log-determinant" else -2.0))

    return Functional(value, slope)


def misfit(p: Array, q: Array, slope: Array, alpha: float) -> float:
    """Standard deviation, over p, of log p / q - dF / alpha, which is constant at an optimum: nats."""
    some = p > 0
    left = np.log(p[some] / q[some]) - slope[some] / alpha
    return math.sqrt(float(p[some] @ (left - p[some] @ left) ** 2))


def maximum(q: Array, functional: Functional, alpha: float, share: float = 0.5) -> Array:
    """The law of probabilities p [n] that is stationary for F - alpha KL(p | q), from q upward. Raises ValueError where none is
    found.

    Args:
        share: of the way to go in the first step.
    """

    def total(p: Array) -> float:
        return functional.value(p) - alpha * kl(p, q)

    tilt, p, best = np.zeros_like(q), q, total(q)
    slope = functional.slope(q)
    left = misfit(q, q, slope, alpha)
    for _ in range(STEPS):
        if left < CLOSE:
            return p
        new = (1 - share) * tilt + share * slope / alpha
        found = tilted(q, new)
        value, slope_there = total(found), functional.slope(found)
        left_there = misfit(found, q, slope_there, alpha)
        # the gain of the last steps is lost in rounding
        if value > best + ROUNDING * (1 + abs(best)) or left_there < left:
            tilt, p, best, slope, left, share = new, found, value, slope_there, left_there, min(1.0, 1.2 * share)
        else:
            share /= 2
    raise ValueError("no law was found at which the utility less the price of the KL has no slope")


def least_multiplier(q: Array, log_tilt: Callable[[float], Array], costs: Array, limit: float) -> float:
    """The least m >= 0 with E c <= limit under the tilt of q by log_tilt(m), in which the cost falls as m rises. Raises
    ValueError where no m is enough."""

    def excess(m: float) -> float:
        return float(tilted(q, log_tilt(m)) @ costs) - limit

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
        if high > MOST_MULTIPLIER:
            raise ValueError("no multiplier is enough to keep the limit")
    return float(brentq(excess, 0.0, high, xtol=1e-13))


def _log(p: Array) -> Array:
    """log p, finite where p is 0."""
    return np.log(np.maximum(p, 1e-300))
