r"""Optima of utilities of the whole law by quadrature: argmax_p F(p) - alpha KL(p | q) for a base q, in any dimension.

Utilities of rewards that are no means are extremes over a number z of functionals that are, F(p) = ext_z g(z) + E_p phi(r, z):

    superquantile, CVaR     the threshold                           laws/tail_duals.py
    E r - c Var r           z the mean, phi = r - c (r - z)^2       max for c > 0, min for c < 0
    log E exp(l r) / l      z = log E exp(l r), g = (z - 1) / l, phi = exp(l r - z) / l       min for l > 0, max for l < 0
    E r + b log(C - E c)    z the price of c, g = C z - b log z + b log b - b, phi = r - z c  min

and less alpha KL each is ext_z g(z) + alpha log E_q exp(phi / alpha): a search of one number. At the optimum z is the mean, the
log partition or the price of the tilted law itself. Where the extreme is a maximum F is convex in p, and laws may be stationary
that are not the best: the whole range of z is searched.
"""

# Mutation tests: test_utility_optimum.py

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from tiltflow.laws.law import Array
from tiltflow.laws.tail_duals import lower_log_tilt, lower_threshold, upper_log_tilt, upper_threshold

NODES = 400
"""Of the first search for z."""


@dataclass(frozen=True)
class Optimum:
    """The law that is best.

    Args:
        masses: its probabilities of the points [n].
        parameter: the number at which it is a tilt of the base: threshold, mean, log partition or price.
        value: F - alpha KL there.
    """

    masses: Array
    parameter: float
    value: float


def tilted(masses: Array, log_tilt: Array) -> Array:
    """Probabilities proportional to masses exp(log_tilt)."""
    p = masses * np.exp(np.minimum(log_tilt - log_tilt[masses > 0].max(), 0))
    return np.asarray(p / p.sum())


def kl(p: Array, q: Array) -> float:
    """KL(p | q) of probabilities [n], in nats."""
    some = p > 0
    return float(p[some] @ np.log(p[some] / q[some]))


def log_mean_exp(masses: Array, logs: Array) -> float:
    """log E exp(logs)."""
    some = masses > 0
    highest = float(logs[some].max())
    return highest + math.log(float(masses[some] @ np.exp(logs[some] - highest)))


def of_superquantile(masses: Array, rewards: Array, share: float, alpha: float) -> Optimum:
    """Of the mean of the best share."""
    t = upper_threshold(masses, rewards, share, alpha)
    return _tail(masses, t, upper_log_tilt(rewards, t, share, alpha), alpha)


def of_cvar(masses: Array, rewards: Array, share: float, alpha: float) -> Optimum:
    """Of the mean of the worst share."""
    t = lower_threshold(masses, rewards, share, alpha)
    return _tail(masses, t, lower_log_tilt(rewards, t, share, alpha), alpha)


def _tail(masses: Array, threshold: float, log_tilt: Array, alpha: float) -> Optimum:
    value = threshold + alpha * log_mean_exp(masses, log_tilt)
    return Optimum(tilted(masses, log_tilt), threshold, value)


def of_entropy(masses: Array, cells: Array | float, alpha: float) -> Optimum:
    """Of the differential entropy, for points with cells of these sizes: p proportional to q^(alpha / (1 + alpha)), whose
    value is (1 + alpha) log int q^(alpha / (1 + alpha))."""
    if alpha <= 0:
        raise ValueError("the entropy without a price of the KL has no optimum: a law can be spread without end")
    power = alpha / (1 + alpha)
    weights = np.asarray(cells * (masses / cells) ** power)
    total = float(weights.sum())
    return Optimum(weights / total, power, (1 + alpha) * math.log(total))


def of_mean_variance(masses: Array, rewards: Array, aversion: float, alpha: float) -> Optimum:
    """Of E r - aversion Var r."""
    return _search(
        masses,
        lambda m: (0.0, rewards - aversion * (rewards - m) ** 2),
        lambda p, m: float(p @ rewards) - m,
        np.linspace(rewards.min(), rewards.max(), NODES),
        alpha,
        largest=aversion > 0,
    )


def of_entropic_risk(masses: Array, rewards: Array, risk: float, alpha: float) -> Optimum:
    """Of log E exp(risk r) / risk: risk > 0 seeks high rewards, risk < 0 avoids low ones."""
    return _search(
        masses,
        lambda z: ((z - 1) / risk, np.exp(risk * rewards - z) / risk),
        lambda p, z: log_mean_exp(p, risk * rewards) - z,
        np.linspace((risk * rewards).min(), (risk * rewards).max(), NODES),
        alpha,
        largest=risk < 0,
    )


def of_log_barrier(masses: Array, rewards: Array, costs: Array, limit: float, strength: float, alpha: float) -> Optimum:
    """Of E r + strength log(limit - E c). Raises ValueError if every point costs the limit or more."""
    room = limit - float(costs[masses > 0].min())
    if room <= 0:
        raise ValueError("no law costs less than the limit")

    def price(p: Array, log_z: float) -> float:
        left = limit - float(p @ costs)
        return (math.log(strength / left) if left > 0 else math.inf) - log_z

    return _search(
        masses,
        lambda s: (limit * math.exp(s) - strength * (s - math.log(strength) + 1), rewards - math.exp(s) * costs),
        lambda p, s: min(price(p, s), 1.0),
        math.log(strength / room) + np.linspace(0, 40, NODES),
        alpha,
        largest=False,
    )


def _search(
    masses: Array,
    linear: Callable[[float], tuple[float, Array]],
    residual: Callable[[Array, float], float],
    nodes: Array,
    alpha: float,
    *,
    largest: bool,
) -> Optimum:
    """The optimum, from (g, phi) of `linear` at z, and z of a law less z, `residual`, which is 0 there."""

    def value(z: float) -> float:
        g, phi = linear(z)
        return g + alpha * log_mean_exp(masses, phi / alpha)

    def law(z: float) -> Array:
        return tilted(masses, linear(z)[1] / alpha)

    values = np.array([value(float(z)) for z in nodes])
    i = int(values.argmax() if largest else values.argmin())
    low, high = float(nodes[max(i - 1, 0)]), float(nodes[min(i + 1, len(nodes) - 1)])
    z = float(brentq(lambda z: residual(law(z), z), low, high, xtol=1e-14 * max(abs(low), abs(high), 1e-300), rtol=1e-14))
    return Optimum(law(z), z, value(z))
