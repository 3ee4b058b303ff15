"""The laws of what is no training toward a tilt, on the line: choosing among samples, guidance, normalised policy gradients."""

# Mutation tests: test_other_laws.py

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq

from tiltflow.laws.adjoint_laws import slope
from tiltflow.laws.law import Array, Density, Law, push_forward
from tiltflow.laws.tilted_law import tilted


def best_of(base: Law, reward: Density, n: int) -> Law:
    """The law of the best of n samples: n F(r)^(n - 1) p, F the distribution function of the reward. KL log n - (n - 1) / n."""
    fine = np.linspace(base.points[0], base.points[-1], 16 * len(base.points))
    values, which = np.unique(reward(fine).round(12), return_inverse=True)
    masses = np.bincount(which, weights=np.exp(base.log_at(fine)))
    below = np.interp(reward(base.points), values, (np.cumsum(masses) - masses / 2) / masses.sum())
    return base.tilt((n - 1) * np.log(np.maximum(below, 1e-300)))


def importance_resampled(base: Law, reward: Density, beta: float, k: int) -> Law:
    """The law of one of k samples, drawn with weights w = exp(r / beta): p E[k w / (w + the others')], where E[1 / (w + s)] is
    the integral of exp(-l w) (E exp(-l w'))^(k - 1) over l > 0."""
    w = np.exp(reward(base.points) / beta - (reward(base.points) / beta).max())
    log_l = np.linspace(-40, 40, 2001)
    decay = np.exp(-np.exp(log_l)[:, None] * w)  # [2001, n]
    others = (decay @ base.probabilities) ** (k - 1)
    return base.tilt(np.log(w) + np.log((np.exp(log_l) * others) @ decay))


def guided(base: Law, reward: Density, beta: float, *, curvature: float = 0.0, std: float = 0.0) -> Law:
    """The law of the ODE with the gradient of r(x1hat) / beta as guidance, as though E exp(r / beta) given x_t were that of
    its mean x1hat.

    Args:
        curvature, std: damp the guidance by 1 + curvature w_t / beta, w_t the posterior variance of a Gaussian of this standard
            deviation: the exact tilt of that Gaussian by a reward of this curvature. By default no damping.
    """

    def field(x: Array, t: float) -> Array:
        given = base.given(x, t)
        variance = given.mean((given.velocities - given.velocity[:, None]) ** 2)
        w = (std * (1 - t)) ** 2 / (t**2 * std**2 + (1 - t) ** 2) if std else 0.0
        force = slope(reward)(x + (1 - t) * given.velocity) / (beta + curvature * w)
        return np.asarray(given.velocity + (1 - t) * variance * force)

    return push_forward(field)


def normalised_tilts(base: Law, reward: Density, penalty: float) -> list[float]:
    """The inverse temperatures eta at which policy gradients with advantages (r - mean) / std over samples of the model, and
    this penalty on the KL, can settle: eta penalty std_eta(r) = 1. Several, or none, for the standard deviation falls as the
    tilt grows; every second one is unstable."""

    def excess(log_eta: float) -> float:
        law = tilted(base, reward, math.exp(-log_eta))
        r = reward(law.points)
        variance = float(law.probabilities @ (r - law.expectation(reward)) ** 2)
        return math.exp(log_eta) * penalty * math.sqrt(variance) - 1

    grid = np.linspace(math.log(1e-3), math.log(1e3), 301)
    signs = np.sign([excess(each) for each in grid])
    return [math.exp(brentq(excess, grid[i], grid[i + 1], xtol=1e-12)) for i in np.flatnonzero(signs[1:] != signs[:-1])]


def per_step_variance(tilt: float) -> float:
    """The variance of a standard normal base under -x^2 / 2 at inverse temperature `tilt` where policy gradients settle in
    continuous time whose steps pay for their own KL alone: log(1 + 2 tilt) / (2 tilt), for 1 / (1 + tilt) of the tilt. With
    s the time to go and y(s) the square of what is left of a state at the end, y' = -2 y (1 + 2 tilt y), and the variance is
    the integral of 2 y."""
    return math.log1p(2 * tilt) / (2 * tilt)


def window_fraction(variance: float, start: float, end: float, noise: float = 1.0) -> float:
    """The share of a linear tilt that control of an SDE on [start, end] alone can reach, of a Gaussian base of this variance.

    Args:
        noise: the square of the SDE's noise in units of the memoryless one's.
    """

    def correlation(t: float) -> float:
        return t * math.sqrt(variance / (t**2 * variance + (1 - t) ** 2))

    return float(1 - (correlation(start) / correlation(end)) ** (2 * noise))
