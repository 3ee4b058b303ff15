r"""The law that reward-weighted flow matching reaches, exactly, in one dimension: no network, no samples.

One round of ORW-CFM-W2 (`tiltflow.methods.orw_cfm_w2`) with a perfect fit maps the law q of the current model to the law of

    v+(x, t) = lambda v_wq(x, t) + (1 - lambda) v_base(x, t),     lambda = m / (m + alpha),   m(x, t) = E_q[w(x_1) | x_t = x],

the minimiser of its loss: E_q[w (x_1 - x_0) | x_t] / m is the field of the law w q / E_q[w], the coupling being independent.
Densities and fields are those of `tiltflow.laws.law`.
"""

# Mutation tests: test_induced_law.py

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from tiltflow.laws.law import Array, Density, Field, Law, push_forward


def induced_velocity(q: Law, base: Law, log_weight: Array, alpha: float, *, both_terms: bool = False) -> Field:
    """v+ as defined at the top of this file, for a law q, weights w at its points, and the base.

    Args:
        both_terms: whether w is in the penalty as well; lambda is then 1 / (1 + alpha).
    """

    def field(x: Array, t: float) -> Array:
        log_m, v = q.posterior(x, t, log_weight)
        if alpha == 0:
            return v
        keep = 1 / (1 + alpha) if both_terms else 1 / (1 + alpha * np.exp(-log_m))
        return np.asarray(keep * v + (1 - keep) * base.velocity(x, t))

    return field


def one_round(q: Law, base: Law, log_weight: Density, alpha: float, weight_mode: str = "normalized") -> Law:
    """The law after one round of ORW-CFM-W2 with a perfect fit, by the `weight_mode` of the method."""
    logs = log_weight(q.points)
    if weight_mode == "normalized":
        logs = logs - float(logsumexp(logs, b=q.probabilities))
    if alpha == 0:
        return q.tilt(logs)
    return push_forward(induced_velocity(q, base, logs, alpha, both_terms=weight_mode == "both-terms"))


def fixed_point(base: Law, log_weight: Density, alpha: float, weight_mode: str = "normalized", *, rounds: int = 200) -> Law:
    """The law at which the rounds settle, for alpha > 0: until the mean moves by less than 3e-6, or so many rounds.

    Raises ValueError for alpha = 0, where there is none.
    """
    if alpha <= 0:
        raise ValueError("without a penalty the rounds do not settle: after n of them the law is w^n p_base")
    q = base
    for _ in range(rounds):
        before, q = q.mean, one_round(q, base, log_weight, alpha, weight_mode)
        if abs(q.mean - before) < 3e-6:
            break
    return q


def mixture_of_rounds(data: Law, log_weight: Density, online_fraction: float) -> Law:
    """The law at which rounds settle with alpha = 0 and samples of which only a fraction f is of the current model, the others
    being data: (1 - f) w p / (Z - f w), Z found from the normalisation. Raises ValueError if there is none: f too near 1."""
    w = np.exp(log_weight(data.points))
    f, p = online_fraction, data.probabilities

    def excess(z: float) -> float:
        return float(((1 - f) * w / (z - f * w)) @ p) - 1

    low, high = f * w.max() * (1 + 1e-9), float(w.max()) * 2
    if excess(low) <= 0:
        raise ValueError(f"with online_fraction {f:g} the rounds converge to the best samples: there is no law to settle at")
    z = brentq(excess, low, high, xtol=1e-13)
    return data.tilt(np.log((1 - f) * w / (z - f * w)))
