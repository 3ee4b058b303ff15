r"""The law of a control from a time t_c on, on the line, by quadrature.

Such a control tilts the end of a path given its state at t_c alone: from a law of that state with density m it makes

    p(x_1) = integral m(x) p_base(x_1 | x) exp(r(x_1) / beta) / E_base[exp(r / beta) | x] dx.

Where m is the base's own, that is as far as it gets: what was settled before t_c stays as it was. Where the steps before t_c
learn the law that was reached, m is its noising: one round is a sweep of a Gibbs sampler between x_1 and x_{t_c}, whose
stationary law is p_base exp(r / beta). On N(m, S) under a reward of curvature -q a round multiplies the error of the mean by

    t_c g / (1 + q w / beta),      g = t_c S / (t_c^2 S + (1 - t_c)^2),      w = S (1 - t_c)^2 / (t_c^2 S + (1 - t_c)^2),

and between modes that are apart at t_c already by next to nothing.
"""

# Mutation tests: test_late_control.py

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from tiltflow.laws.law import NODES, SUPPORT, Density, Law, log_normal


def late_control(base: Law, reward: Density, beta: float, time: float, *, rounds: int = 1) -> Law:
    """The law after so many rounds of a control from `time` on, 0 < time < 1, of which the first starts from states of the
    base, and each other from states of the law before it."""
    x1 = base.points
    x = np.linspace(-SUPPORT, SUPPORT, 4 * NODES)  # samples and noise are within, and so are their mixtures
    noising = log_normal(x, time * x1[:, None], 1 - time)  # log density of x at `time`, given each x_1: [x_1, x]
    noising -= logsumexp(noising, axis=1, keepdims=True)
    joint = noising + (base.log_density + reward(x1) / beta)[:, None]
    back = np.exp(joint - logsumexp(joint, axis=0))  # of x_1 given x, tilted
    forth, probabilities = np.exp(noising), base.probabilities
    for _ in range(rounds):
        probabilities = back @ (probabilities @ forth)
    return Law.normalised(x1, np.log(probabilities.clip(min=1e-300)))
