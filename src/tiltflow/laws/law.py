r"""Laws on the line: densities on a grid, the velocity fields of their paths, and the law of a field's ODE, by quadrature.

Fields are quadratures over x_1 before t = 1/2 and over x_0 after it, where the other kernel is narrow. The law of a field is
found by integrating its ODE backward from a grid of samples to the noise, whose density is known. The linear path serves all:
which law a method reaches is the same for every Gaussian path.
"""

# Mutation tests: test_induced_law.py

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

Array = NDArray[np.float64]
Density = Callable[[Array], Array]
Field = Callable[[Array, float], Array]
"""A velocity field: x [n] and a time -> [n]."""

NOISE = np.linspace(-8, 8, 121)  # quadrature over x_0: the trapezoid rule is spectrally accurate for Gaussians
SUPPORT = 8.0  # the grid of samples is [-SUPPORT, SUPPORT]
NODES = 321
STEPS = 24  # steps of Runge-Kutta 4, shorter at both ends
TAIL = 24  # points that the extrapolation beyond the last one is fitted to
FLOOR = -60.0  # log densities below are extrapolated: the backward ODE has no digits there


def _times(steps: int) -> list[float]:
    """0, .., 1: ends and middles of the steps, which are shorter at both ends."""
    ends = (1 - np.cos(np.pi * np.arange(steps + 1) / steps)) / 2
    return [float(t) for t in np.sort(np.concatenate([ends, (ends[1:] + ends[:-1]) / 2]))]


GRID, TIMES = np.linspace(-SUPPORT, SUPPORT, NODES), _times(STEPS)


def log_normal(x: Array, mean: Array | float, std: Array | float) -> Array:
    return -(((x - mean) / std) ** 2) / 2 - np.log(std * math.sqrt(2 * math.pi))


def cubic_spline(points: Array, values: Array) -> Any:
    """SciPy's, which is slow to import: few runs have laws on the line."""
    from scipy.interpolate import CubicSpline

    return CubicSpline(points, values)


@dataclass(frozen=True)
class Posterior:
    """The law of (x_1, x_0) given x_t = x [n] on the linear path: their values `data` and `noise`, one of them [m], the same
    for all x, the other [n, m]; the `probabilities` [n, m]; and the `log_density` of x_t at x [n]."""

    x: Array
    t: float
    data: Array
    noise: Array
    probabilities: Array
    log_density: Array

    @property
    def velocities(self) -> Array:
        """x_1 - x_0: [n, m]."""
        return self.data - self.noise

    def mean(self, values: Array) -> Array:
        """E[values | x_t], for values [m] or [n, m]: [n]."""
        if values.ndim == 1:
            return np.asarray(self.probabilities @ values)
        return np.asarray(np.einsum("nm,nm->n", self.probabilities, values))

    def pull(self, values: Array) -> Array:
        """E[values (x_1 - x_0) | x_t]: [n]."""
        if self.data.ndim == 1:
            return np.asarray((self.mean(values * self.data) - self.x * self.mean(values)) / (1 - self.t))
        return np.asarray((self.x * self.mean(values) - self.mean(values * self.noise)) / self.t)

    @cached_property
    def velocity(self) -> Array:
        """E[x_1 - x_0 | x_t]: [n]."""
        return self.pull(np.ones(self.probabilities.shape[1]))


@dataclass(frozen=True)
class Law:
    """A density on the line, by its logarithm `log_density` at `points`, normalised."""

    points: Array
    log_density: Array

    @classmethod
    def of(cls, log_density: Density) -> Law:
        """The law with this log density, up to a constant."""
        return cls.normalised(GRID, log_density(GRID))

    @classmethod
    def normalised(cls, points: Array, log_density: Array) -> Law:
        """The law with this log density at equally spaced points, up to a constant."""
        return cls(points, log_density - logsumexp(log_density) - math.log(points[1] - points[0]))

    def tilt(self, log_weight: Array) -> Law:
        """The law w q / E_q[w], for log w at the points."""
        return Law.normalised(self.points, self.log_density + log_weight)

    @cached_property
    def probabilities(self) -> Array:
        """Probabilities of the points: density times spacing."""
        p = np.exp(self.log_density)
        return np.asarray(p / p.sum())

    @cached_property
    def _spline(self) -> Any:
        return cubic_spline(self.points, self.log_density)

    def log_at(self, x: Array) -> Array:
        """log density at x; beyond the points the parabola through the end that fits the last of them best, which never opens
        upward: a second derivative at the end itself is rounding error, and grows from round to round."""
        values = np.asarray(self._spline(x))
        for end, beyond, last in ((0, x < self.points[0], slice(TAIL)), (-1, x > self.points[-1], slice(-TAIL, None))):
            near, height = self.points[last] - self.points[end], self.log_density[last] - self.log_density[end]
            (slope, curvature), *_ = np.linalg.lstsq(np.stack([near, near**2], 1), height, rcond=None)
            if curvature > 0:
                slope, curvature = float(near @ height / (near @ near)), 0.0
            away = x[beyond] - self.points[end]
            values[beyond] = self.log_density[end] + away * slope + away**2 * curvature
        return values

    def expectation(self, function: Density) -> float:
        return float(self.probabilities @ function(self.points))

    @property
    def mean(self) -> float:
        return self.expectation(lambda x: x)

    @property
    def variance(self) -> float:
        return self.expectation(lambda x: x**2) - self.mean**2

    @property
    def positive(self) -> float:
        """P(x > 0), the point at 0 counting half."""
        return self.expectation(lambda x: np.heaviside(np.where(np.abs(x) < 1e-12, 0, x), 0.5))

    def quantiles(self, levels: Array) -> Array:
        """Inverse of the distribution function at `levels` in (0, 1)."""
        from scipy.interpolate import PchipInterpolator

        h = self.points[1] - self.points[0]
        cdf = np.concatenate([[0.0], np.cumsum(self.probabilities)])
        edges = np.concatenate([[self.points[0] - h / 2], self.points + h / 2])
        rising = np.concatenate([[True], np.diff(cdf) > 1e-15])
        return np.asarray(PchipInterpolator(cdf[rising], edges[rising])(levels))

    def w2(self, other: Law) -> float:
        """2-Wasserstein distance: on the line, that of the quantile functions."""
        levels = (np.arange(20_000) + 0.5) / 20_000
        return float(np.sqrt(np.mean((self.quantiles(levels) - other.quantiles(levels)) ** 2)))

    def kl(self, other: Law) -> float:
        """KL(self | other)."""
        return float(self.probabilities @ (self.log_density - other.log_at(self.points)))

    def given(self, x: Array, t: float) -> Posterior:
        """The law of (x_1, x_0) given x_t = x [n] on the linear path."""
        if t < 0.5:
            data, noise = self.points, (x[:, None] - t * self.points) / (1 - t)
            joint, cell = self.log_density - noise**2 / 2, (self.points[1] - self.points[0]) / (1 - t)
        else:
            data, noise = (x[:, None] - (1 - t) * NOISE) / t, NOISE
            joint, cell = self.log_at(data) - NOISE**2 / 2, (NOISE[1] - NOISE[0]) / t
        highest = joint.max(axis=1, keepdims=True)
        np.exp(joint - highest, out=joint)
        total = joint.sum(1, keepdims=True)
        log_density = highest + np.log(total) + math.log(cell / math.sqrt(2 * math.pi))
        return Posterior(x, t, data, noise, joint / total, log_density[:, 0])

    def posterior(self, x: Array, t: float, log_weight: Array) -> tuple[Array, Array]:
        """(log m, v) at x_t = x [n] on the linear path: m = E[w | x_t], v the velocity of the law w q.

        Args:
            log_weight: log w at the points.
        """
        given = self.given(x, t)
        inside = given.data.clip(self.points[0], self.points[-1])
        logs = log_weight if t < 0.5 else cubic_spline(self.points, log_weight)(inside)
        w = np.exp(logs)
        m = given.mean(w)
        return np.log(m), given.pull(w) / m

    def velocity(self, x: Array, t: float) -> Array:
        """E[x_1 - x_0 | x_t = x] on the linear path."""
        return self.given(x, t).velocity


@dataclass(frozen=True)
class Table:
    """A velocity field by its values [len(TIMES), NODES] at the times of `push_forward` and the points of the grid; beyond
    them it is constant."""

    values: Array

    @classmethod
    def of(cls, field: Field) -> Table:
        """The field, evaluated once."""
        return cls(np.stack([field(GRID, t) for t in TIMES]))

    def __call__(self, x: Array, t: float) -> Array:
        return np.asarray(cubic_spline(GRID, self.values[TIMES.index(t)])(x.clip(-SUPPORT, SUPPORT)))


def push_forward(field: Field, *, steps: int = STEPS) -> Law:
    """The law of the ODE of a velocity field, from standard normal noise."""
    x, nodes = GRID, _times(steps)[::-1]
    for s, middle, t in zip(nodes[:-2:2], nodes[1::2], nodes[2::2], strict=True):
        h = t - s
        k1 = field(x, s)
        k2 = field(x + h / 2 * k1, middle)
        k3 = field(x + h / 2 * k2, middle)
        k4 = field(x + h * k3, t)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return law_of_transport(x)


def law_of_transport(start: Array) -> Law:
    """The law of the map that carries standard normal noise, at `start` [NODES], to the points of the grid."""
    slope = cubic_spline(GRID, start)(GRID, 1)
    log_density = log_normal(start, 0.0, 1.0) + np.log(np.maximum(slope, 1e-300))
    trusted = np.flatnonzero((log_density > FLOOR) & (np.abs(start) < NOISE[-1]))
    kept = slice(trusted[0], trusted[-1] + 1)
    return Law.normalised(GRID, Law(GRID[kept], log_density[kept]).log_at(GRID))


def velocity_distance(q: Law, base: Law, field: Field | None = None, *, times: int = 48) -> float:
    """J = integral over t of E|v - v_base|^2 over x_t of the path of q: the penalty of the loss. v is `field`, or q's own."""
    nodes, lengths = np.polynomial.legendre.leggauss(times)
    total = 0.0
    for node, length in zip((nodes + 1) / 2, lengths / 2, strict=True):
        # x_t = t x_1 + (1 - t) x_0 on a product grid, coarse in x_0 where (1 - t) is small anyway
        x0 = np.linspace(-7, 7, 57)
        weights = np.exp(log_normal(x0, 0.0, 1.0)) * (x0[1] - x0[0])
        some = slice(None, None, 4)
        p = q.probabilities[some] / q.probabilities[some].sum()
        x = (node * q.points[some][:, None] + (1 - node) * x0).ravel()
        joint = (p[:, None] * weights).ravel()
        kept = joint > 1e-12
        away = (field or q.velocity)(x[kept], node) - base.velocity(x[kept], node)
        total += length * float(joint[kept] @ away**2)
    return total
