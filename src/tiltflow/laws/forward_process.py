r"""The laws of forward-process regression: implicit and explicit tilt matching, RAM, AWM, NFT, ADRPO and the reverse form.

All draw x_1 from the current model, of law q, noise it afresh, and regress the network to an anchor plus the noise's own
velocity u = x_1 - x_0, as far as the reward of x_1 says so. With a perfect fit a round makes the field

    v(x, t) = a(x, t) + E_q[ C(x_1) (u - rho(x, t)) | x_t = x ],

where the anchor a is the field of the last round or of the base, C a function of the reward, and the residual rho the network
itself (then v is on both sides), or the anchor, or E_q[u | x_t], the exact field of the samples. C = w / E_q[w] - 1 around the
last round, the network its own residual, is the field of w q / E_q[w], exactly: implicit tilt matching. The others are
quadratures of the tilting identity (`tilting_rate`) with the whole step at one end.
"""

# Mutation tests: test_forward_process.py

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from scipy.special import logsumexp

from tiltflow.laws.law import GRID, TIMES, Array, Density, Field, Law, Table, push_forward

Residual = Literal["network", "samples", "anchor"]

TOLERANCE = 1e-5  # of mean and variance, where rounds count as settled
MOST_ROUNDS = 60
RUNAWAY = 1e6  # a velocity beyond all
MEMORY = 4  # rounds that the acceleration looks back


def tilting_rate(q: Law, reward: Density) -> Field:
    """Cov_q(r, u | x_t): the derivative in eta of the field of q exp(eta r), at 0."""

    def field(x: Array, t: float) -> Array:
        given = q.given(x, t)
        r = reward(given.data)
        return given.pull(r) - given.mean(r) * given.velocity

    return field


def regression(q: Law, coefficient: Density, anchor: Field, residual: Residual) -> Field:
    """v as defined at the top of this file, from samples of q. Where the network is its own residual, the regression has no
    minimum at E_q[C | x_t] <= -1: the field raises ValueError.

    Args:
        coefficient: C, of points x_1.
        anchor: a.
    """

    def field(x: Array, t: float) -> Array:
        given, start = q.given(x, t), anchor(x, t)
        c = coefficient(given.data)
        mean, pull = given.mean(c), start + given.pull(c)
        if residual == "network":
            if mean.min() <= -1:
                raise ValueError("the regression has a pole: samples are worse than the mean reward by more than beta")
            return np.asarray(pull / (1 + mean))
        return np.asarray(pull - mean * (start if residual == "anchor" else given.velocity))

    return field


def advantage(q: Law, reward: Density, step: float) -> Density:
    """step (r - E_q r)."""
    mean = q.expectation(reward)
    return lambda x: step * (reward(x) - mean)


def noise_over_signal(q: Law, reward: Density, step: float) -> dict[str, float]:
    """The noise of a round's gradient at its optimum v*, for weights W = exp(step r) / E_q in reward-weighted regression and
    for implicit tilt matching, over |v* - v|^2: how many samples tell the round's change from nothing.

        reward-weighted  E |W (u - v*)|^2
        implicit         E |(W - 1) (u - v*) - (v* - v)|^2
    """
    total = q.expectation(lambda x: np.exp(step * reward(x)))
    nodes, lengths = np.polynomial.legendre.leggauss(48)
    weighted, implicit, signal = 0.0, 0.0, 0.0
    for t, length in zip((nodes + 1) / 2, lengths, strict=True):
        given = q.given(GRID, float(t))
        w = np.exp(step * reward(given.data)) / total
        best = given.pull(w) / given.mean(w)
        away, moved = given.velocities - best[:, None], best - given.velocity
        mass = length * np.exp(given.log_density)  # up to a factor that cancels
        weighted += float(mass @ given.mean((w * away) ** 2))
        implicit += float(mass @ given.mean(((w - 1) * away - moved[:, None]) ** 2))
        signal += float(mass @ moved**2)
    return {"reward-weighted": weighted / signal, "implicit": implicit / signal}


def explicit_rounds(base: Law, reward: Density, beta: float, rounds: int, residual: Residual = "anchor") -> Law:
    """The law after so many rounds of explicit tilt matching, each a step 1 / (rounds beta) of the tilting identity from the
    last network. A full round of DiffusionNFT without a penalty is one of these.

    Args:
        residual: "samples" for rounds that start from the exact field of their samples instead.
    """
    q, field = base, Table.of(base.velocity)
    for _ in range(rounds):
        anchor = field if residual == "anchor" else q.velocity
        field = Table.of(regression(q, advantage(q, reward, 1 / (beta * rounds)), anchor, residual))
        q = push_forward(field)
    return q


def ram(base: Law, reward: Density, beta: float, residual: Residual = "network", *, lowest: float = -np.inf) -> Law:
    """The law at which RAM, AWM and DiffusionNFT with a reference penalty settle: v = v_base + E_q[A (u - v) | x_t] / beta, of
    advantages A = r - E_q r and samples of v's own law q. Raises ValueError where they do not settle.

    Args:
        residual: "samples" for E_q[u | x_t] instead of v, which is v_base + Cov_q(r, u | x_t) / beta and has no pole; "anchor"
            for ADRPO, whose residual is v_base.
        lowest: where A / beta is clipped; above -1 there is no pole.
    """

    def coefficient(q: Law) -> Density:
        a = advantage(q, reward, 1 / beta)
        return lambda x: np.maximum(a(x), lowest)

    return settled(base, coefficient, residual)


def reverse(base: Law, reward: Density, beta: float) -> Law:
    """The law at which the reverse form settles, C = 1 - e^(-r / beta) / E_q e^(-r / beta) around the base: the tilt. Raises
    ValueError where E_q e^(-r / beta) is too large on the way there."""

    def coefficient(q: Law) -> Density:
        log_mean = float(logsumexp(-reward(q.points) / beta, b=q.probabilities))
        return lambda x: 1 - np.exp(-reward(x) / beta - log_mean)

    return settled(base, coefficient, "anchor")


def settled(base: Law, coefficient: Callable[[Law], Density], residual: Residual) -> Law:
    """The law at which rounds around the base settle, by Anderson's acceleration. Raises ValueError if they run away, or have
    not settled after `MOST_ROUNDS`.

    Args:
        coefficient: the law of the samples -> C.
    """
    anchor, q = Table.of(base.velocity), base
    root = np.stack([np.exp(base.given(GRID, t).log_density / 2) for t in TIMES])
    field, moves, ends = anchor, list[Array](), list[Array]()
    for _ in range(MOST_ROUNDS):
        c, before = coefficient(q), q
        with np.errstate(over="ignore", invalid="ignore"):
            move = Table.of(regression(q, c, anchor, residual)).values - field.values
        if not np.allclose(move, 0, atol=RUNAWAY):
            break
        # the more C differs between samples, the further a whole move would overshoot where it is lowest
        share = 1 / (1 + 2 * float(q.probabilities @ c(q.points) ** 2) ** 0.5)
        moves, ends = [*moves[-MEMORY:], move], [*ends[-MEMORY:], field.values + share * move]
        differences = np.stack([(root * (move - each)).ravel() for each in moves], 1)
        steps, *_ = np.linalg.lstsq(differences, (root * move).ravel(), rcond=1e-8)
        field = Table(ends[-1] - sum(step * (ends[-1] - end) for step, end in zip(steps, ends, strict=True)))
        q = push_forward(field)
        first, *_, last = q.probabilities
        if not np.allclose((first, last), 0, atol=1e-3):
            break
        if np.allclose((q.mean, q.variance), (before.mean, before.variance), rtol=0, atol=TOLERANCE):
            return q
    raise ValueError("no law was found at which the rounds settle: the reward spreads too far for this beta")
