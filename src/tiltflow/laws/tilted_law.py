"""The tilted law p exp(r / beta) on the line: its KL, what samples at one temperature say of another, what a law has of it.

With eta = 1 / beta, d KL / d eta = eta Var_eta(r): the KL from the base rises with eta, so each has one temperature.
"""

# Mutation tests: test_tilted_law.py

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from tiltflow.laws.law import Array, Density, Law


def tilted(base: Law, reward: Density, beta: float) -> Law:
    """p exp(r / beta): what a method reaches that is exact."""
    return base.tilt(reward(base.points) / beta)


def temperature_of_kl(base: Law, reward: Density, kl: float) -> float:
    """beta such that KL(p exp(r / beta) | p) is so many nats. Raises ValueError if there is none: of a reward that is the same
    everywhere, or where so large a KL leaves less of the law than a point of its grid."""
    r = reward(base.points)
    spread = float(base.probabilities @ (r - base.probabilities @ r) ** 2) ** 0.5
    if spread == 0:
        raise ValueError("the reward is the same everywhere: no temperature tilts the law")

    def excess(log_eta: float) -> float:
        return tilted(base, reward, spread * np.exp(-log_eta)).kl(base) - kl

    low, high = -15.0, 0.0
    while excess(high) < 0:
        high += 1
        law = tilted(base, reward, spread * np.exp(-high))
        if law.variance < (2 * (law.points[1] - law.points[0])) ** 2:
            raise ValueError(f"a KL of {kl:g} nats leaves almost nothing of the law but its best point")
    return float(spread * np.exp(-brentq(excess, low, high, xtol=1e-12)))


def achieved_tilt(q: Law, base: Law, reward: Density, beta: float) -> tuple[float, float]:
    """How much of the tilt at beta the law q has: the slope of log q / p on r / beta over q, by least squares, and R^2."""
    log_ratio, tilt, p = q.log_density - base.log_density, reward(q.points) / beta, q.probabilities
    log_ratio, tilt = log_ratio - p @ log_ratio, tilt - p @ tilt
    covariance, variance = p @ (log_ratio * tilt), p @ tilt**2
    return float(covariance / variance), float(covariance**2 / (variance * (p @ log_ratio**2)))


def effective_share(q: Law, log_weight: Array) -> float:
    """(E w)^2 / E w^2, for log w at the points: the effective sample size of samples of q weighted by w, as a share."""
    p = q.probabilities
    return float(np.exp(2 * logsumexp(log_weight, b=p) - logsumexp(2 * log_weight, b=p)))


def step_of_effective_share(q: Law, reward: Density, share: float, most: float) -> float:
    """The step h <= most such that weights exp(h r) leave this effective share of samples of q."""
    r = reward(q.points)
    if effective_share(q, most * r) >= share:
        return most
    return float(brentq(lambda h: effective_share(q, h * r) - share, 0.0, most, xtol=1e-12))


def replay(base: Law, reward: Density, drawn: Sequence[float], eta: float) -> tuple[float, float]:
    """Samples pooled from as many of p exp(eta_j r) for each eta_j of `drawn`, weighted to p exp(eta r) by
    1 / mean_j (Z_eta / Z_j) exp((eta_j - eta) r): their effective share, and the largest weight."""
    r, p = reward(base.points), base.probabilities
    log_z = [float(logsumexp(each * r, b=p)) for each in (*drawn, eta)]
    parts = np.stack([(each - eta) * r + log_z[-1] - z for each, z in zip(drawn, log_z, strict=False)])
    log_weight = np.log(len(drawn)) - logsumexp(parts, axis=0)
    target = base.tilt(eta * r).probabilities
    return float(1 / (target @ np.exp(log_weight))), float(np.exp(log_weight.max()))
