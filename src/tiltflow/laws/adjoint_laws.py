"""The laws of cheaper kinds of Adjoint Matching, on the line: by scores of a smoothed base, and by control without noise.

Adjoint Matching itself, on a memoryless chain of many steps, reaches the tilt; control from a time on is `late_control.py`.
"""

# Mutation tests: test_adjoint_laws.py

from __future__ import annotations

import numpy as np

from tiltflow.laws.law import GRID, NODES, Array, Density, Field, Law, law_of_transport, push_forward

STEPS = 24  # of Runge-Kutta 4 for the control without noise
SMALL = 1e-3  # of differences that stand for derivatives


def slope(function: Density) -> Density:
    """The derivative of a function."""
    return lambda x: np.asarray((function(x + SMALL) - function(x - SMALL)) / (2 * SMALL))


def smoothed_tilt(base: Law, reward: Density, beta: float, time: float, *, rescaled: bool = False) -> Law:
    """The tilt of the base's law at `time`, of t x_1 + (1 - t) x_0: where Adjoint Matching by the base's score there settles.

    Args:
        rescaled: of that law divided by t: the score is taken at t x_1, and multiplied by t.
    """
    points = base.points * time if rescaled else base.points
    return Law.normalised(base.points, base.given(points, time).log_density + reward(base.points) / beta)


def score_round(q: Law, base: Law, reward: Density, beta: float, variance: float) -> Law:
    """The law after one exact round of Adjoint Matching by scores, from samples of q, with a Gaussian of this variance as
    reference; its mean cancels."""
    force = slope(lambda x: reward(x) / beta + base.log_at(x))

    def field(x: Array, t: float) -> Array:
        total = t**2 * variance + (1 - t) ** 2
        given = q.given(x, t)
        pull = given.mean(variance * force(given.data) + given.data)
        return np.asarray(((t * variance - (1 - t)) * x + (1 - t) * pull) / total)

    return push_forward(field)


def deterministic_control(base: Law, reward: Density, beta: float, from_time: float = 0.0) -> Law:
    """The law of the ODE under the control u that maximises E r(x_1) - beta / 2 integral |u|^2, from a time on: x' = v + u,
    u' = -u dv/dx, u(1) = r'(x_1) / beta, backward from every x_1. Where several such paths start at one point, that of the
    highest value is its path, and the others' ends are not reached."""
    early, late = (
        start + (end - start) * (1 - np.cos(np.pi * np.arange(STEPS + 1) / STEPS)) / 2
        for start, end in ((0.0, from_time), (from_time, 1.0))
    )
    state = np.stack([GRID, slope(reward)(GRID) / beta, np.zeros_like(GRID)])
    state = _backward(base.velocity, state, late)
    if from_time:
        state[1] = 0
        state = _backward(base.velocity, state, early)
    start, value = state[0], reward(GRID) / beta - state[2]
    return law_of_transport(start).tilt(np.log(np.maximum(_reached(start, value), 1e-26)))


def _reached(start: Array, value: Array) -> Array:
    """The share of each end's cell that is reached, by paths of the highest value from their `start`, [NODES] each."""
    rising = np.diff(start, append=np.inf) > 0
    pieces = np.split(np.arange(NODES), np.flatnonzero(rising[1:] != rising[:-1]) + 1)
    margin = np.where(rising, np.inf, -np.inf)
    for own in pieces:
        for other in pieces:
            if rising[own[0]] and rising[other[0]] and own is not other:
                best = np.interp(start[own], start[other], value[other], left=-np.inf, right=-np.inf)
                margin[own] = np.minimum(margin[own], value[own] - best)
    with np.errstate(invalid="ignore"):
        change = np.abs(np.gradient(margin)).clip(min=1e-300)
        inside = (0.5 + margin / change).clip(0, 1)
    return np.where(np.isfinite(change), inside, np.heaviside(margin, 0.5))  # a piece begins or ends where it is infinite


def _backward(velocity: Field, state: Array, times: Array) -> Array:
    """(x, u, energy) at times[0], [3, n], from those at times[-1]; the energy is the integral of u^2 / 2."""

    def change(state: Array, t: float) -> Array:
        x, u, _ = state
        return np.stack([velocity(x, t) + u, -u * slope(lambda y: velocity(y, t))(x), -(u**2) / 2])

    for s, t in zip(times[:0:-1], times[-2::-1], strict=True):
        h = t - s
        k1 = change(state, s)
        k2 = change(state + h / 2 * k1, s + h / 2)
        k3 = change(state + h / 2 * k2, s + h / 2)
        k4 = change(state + h * k3, t)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state
