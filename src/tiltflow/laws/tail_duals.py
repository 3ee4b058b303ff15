r"""Thresholds of tails: the law that is best in its best share, or in its worst, at a price of its KL, is one tilt of the base.

The mean of the best share s (superquantile) and of the worst (CVaR) are extremes over a threshold t of linear functionals,

    superquantile(p) = min_t  t + E_p (r - t)+ / s,          CVaR(p) = max_t  t - E_p (t - r)+ / s,

and each of those, less a KL(p | q), is greatest at a tilt of q. So the best law of all is the tilt at the threshold that is

    upper:  argmin_t  t + a log E_q exp( (r - t)+ / (a s)),      p proportional to q exp( (r - t)+ / (a s)),
    lower:  argmax_t  t + a log E_q exp(-(t - r)+ / (a s)),      p proportional to q exp(-(t - r)+ / (a s))

(arXiv 2602.16796). Between two neighbouring values of the reward both are a log(A + B exp(-t / (a s))) + t, convex in t. So the
upper one, convex over all, has its minimum in closed form; the lower one has its maximum at a value of the reward.
"""

# Mutation tests: test_tail_duals.py

from __future__ import annotations

import math

import numpy as np

from tiltflow.laws.law import Array


def upper_threshold(masses: Array, rewards: Array, share: float, alpha: float) -> float:
    """The threshold of the best share, for rewards [n] of points with these probabilities [n] under the base, at the price
    alpha of the KL."""
    r, p = _sorted(masses, rewards)
    if len(r) == 1:
        return float(r[0])
    log_below = np.log(np.cumsum(p))[:-1]  # A: P(r <= t) for t between a value and the next
    log_above = _log_sums(np.log(p) + r / (alpha * share))[1:]  # B: E[exp(r / (a s)); r > t]
    stationary = alpha * share * (log_above - log_below + math.log1p(-share) - math.log(share))
    # the slope at the right end of an interval rises from one to the next: the minimum is in the first where it is not below 0
    i = int(np.argmax(stationary <= r[1:])) if (stationary <= r[1:]).any() else len(r) - 2
    return float(np.clip(stationary[i], r[i], r[i + 1]))


def lower_threshold(masses: Array, rewards: Array, share: float, alpha: float) -> float:
    """The threshold of the worst share; arguments as of `upper_threshold`."""
    r, p = _sorted(masses, rewards)
    log_from = np.log(np.cumsum(p[::-1])[::-1])  # A: P(r >= t) at each value t
    log_below = np.concatenate([[-np.inf], _log_sums((np.log(p) + r / (alpha * share))[::-1])[::-1][:-1]])
    return float(r[np.argmax(r + alpha * np.logaddexp(log_from, log_below - r / (alpha * share)))])


def upper_log_tilt(rewards: Array, threshold: float, share: float, alpha: float) -> Array:
    return np.maximum(rewards - threshold, 0) / (alpha * share)


def lower_log_tilt(rewards: Array, threshold: float, share: float, alpha: float) -> Array:
    return -np.maximum(threshold - rewards, 0) / (alpha * share)


def _sorted(masses: Array, rewards: Array) -> tuple[Array, Array]:
    """The distinct values of the reward in ascending order, and their probabilities, of those that have one."""
    r, which = np.unique(rewards[masses > 0], return_inverse=True)
    return r, np.bincount(which, masses[masses > 0]).astype(np.float64)


def _log_sums(logs: Array) -> Array:
    """log of the sums from each on: [n]."""
    return np.logaddexp.accumulate(logs[::-1])[::-1]
