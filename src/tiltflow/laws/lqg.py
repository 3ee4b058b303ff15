r"""The linear-quadratic-Gaussian problem: policy gradients, value functions and optima that are known to ten digits.

Data N(m, S) per coordinate, a variance-preserving diffusion in its own time tau = 0 (noise) .. T (data) and coordinates,
steered by the affine policy u(tau, x) = K x + k, added to the score, toward r(x) = q x - Q x^2 / 2:

    dX = (X / 2 + e (score + u)) dtau + eta dB,     e = (1 + eta^2) / 2,   w = (e / eta)^2,
    J  = E[ r(X_T) - int (R X^2 + lambda w u^2) / 2 dtau ],   X_0 ~ N(a_T m, v_T),   score = -(x - a m) / v,
    a  = exp(-(T - tau) / 2),   v = a^2 S + 1 - a^2.

(2502.01819 with the score as the action; any other noise schedule is this one in another clock. R, the cost of the state, is 0
there.) Its value function is quadratic: V(tau, x) = -P x^2 / 2 + p x + c. So is that of the Euler-Maruyama chain of N steps,
which is the objective that a program optimises, and whose step n costs R c_n X^2 / 2 with c_n = h_n dtau/dt, h_n its length on
the linear path. Both are solved here, for constant or time-dependent K and k, and for the optimal ones.
"""

# Mutation tests: test_lqg.py test_verify.py

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.integrate import solve_ivp

from tiltflow.settings import Settings

Array = NDArray[np.float64]
Positive = Annotated[float, Field(gt=0)]
Gain = Callable[[float], float]
"""K or k as a function of tau."""


@dataclass(frozen=True)
class Solution:
    """The exact solution of a policy; sums over the coordinates where there are several.

    `gradient` is (dJ/dK, dJ/dk) for K and k moved alike at all times, zero at an optimum. `mean` and `variance` are those of
    X_T. `value` gives (P, p, c) of one coordinate at a time tau; of a chain, at the step number.
    `policy` gives (K, k) in the same way.
    """

    objective: float
    gradient: tuple[float, float]
    mean: float
    variance: float
    path_kl: float
    value: Callable[[float], Array]
    policy: Callable[[float], Array]


class Lqg(Settings):
    """Linear-quadratic-Gaussian control of a diffusion: exact objective, gradient, value function and optimum."""

    name: Literal["lqg"] = "lqg"
    dimension: Annotated[int, Field(ge=1)] = 1
    """Dimension of x; the coordinates are independent and alike."""
    Q: Annotated[float, Field(ge=0)] = 1.3
    """Quadratic coefficient of the reward q x - Q x^2 / 2 of each coordinate."""
    q: float = 0.7
    """Linear coefficient of the same reward."""
    state_cost: Annotated[float, Field(ge=0)] = 0.0
    """R of the running reward -R x^2 / 2 of each coordinate, per unit of the diffusion's own time; 0 for none."""
    T: Positive = 2.0
    """Length of the diffusion in its own time: at its noise end exp(-T) of the data's variance is left."""
    K: float = 0.2
    """Slope of the policy at which values and gradients are shown and estimated."""
    k: float = -0.1
    """Its intercept."""
    mean: float = 0.0
    """Mean of the data."""
    variance: Positive = 1.0
    """Variance of the data."""
    eta: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Noise of the sampler; 1 is memoryless up to the signal left at the noise end."""

    @property
    def gain(self) -> float:
        """e: the change of the drift for a change of the score by 1."""
        return (1 + self.eta**2) / 2

    @property
    def price(self) -> float:
        """w: twice the path KL per unit of time of a change of the score by 1."""
        return (self.gain / self.eta) ** 2

    def marginal(self, tau: float) -> tuple[float, float]:
        """a and v at tau: x_tau ~ N(a m, v) under the base."""
        square = math.exp(tau - self.T)
        return square**0.5, square * self.variance + 1 - square

    def drift(self, tau: float) -> tuple[float, float]:
        """(F, h) of the base: dX = (F X + h) dtau + eta dB."""
        a, v = self.marginal(tau)
        return 0.5 - self.gain / v, self.gain * a * self.mean / v

    def start(self) -> tuple[float, float]:
        """Mean and variance of X_0."""
        a, v = self.marginal(0.0)
        return a * self.mean, v

    def spans(self, steps: int) -> Array:
        """c_n: the lengths of the chain's steps on the linear path, in its own time by dtau/dt at their beginnings: [steps]."""
        alpha = np.exp((np.linspace(0, self.T, steps + 1) - self.T) / 2)
        t = alpha / (alpha + np.sqrt(1 - alpha**2))
        found: Array = np.diff(t) * pace(t[:-1])
        return found

    def objective(self, value: Array) -> float:
        """J from (P, p, c) at tau = 0."""
        mean, variance = self.start()
        P, p, c = value
        return float(self.dimension * (-P * (mean**2 + variance) / 2 + p * mean + c))

    def tilted(self, beta: float) -> tuple[float, float]:
        """Mean and variance of data(x) exp(r(x) / beta), the law that the optimum has up to its initial-value bias."""
        variance = 1 / (1 / self.variance + self.Q / beta)
        return variance * (self.mean / self.variance + self.q / beta), variance


def pace(t: Array) -> Array:
    """dtau/dt at times t on the linear path, above 0, where tau = 2 log alpha + T."""
    return 2 * (1 - t) / (t * (t**2 + (1 - t) ** 2))


def evaluate_policy(problem: Lqg, beta: float, K: Gain | None = None, k: Gain | None = None) -> Solution:
    """The affine policy (K, k), by default the problem's constant one, in continuous time."""
    slope, intercept = K or (lambda tau: problem.K), k or (lambda tau: problem.k)

    def backward(tau: float, y: Array) -> Array:
        P, p, _ = y
        (F, h), (a, b) = problem.drift(tau), (slope(tau), intercept(tau))
        F, h, price = F + problem.gain * a, h + problem.gain * b, beta * problem.price
        return np.array(
            [
                -2 * F * P - price * a**2 - problem.state_cost,
                -F * p + h * P + price * a * b,
                -h * p + problem.eta**2 * P / 2 + price * b**2 / 2,
            ]
        )

    return _solution(problem, beta, backward, lambda tau, value: np.array([slope(tau), intercept(tau)]))


def optimum(problem: Lqg, beta: float) -> Solution:
    """The optimal policy in continuous time: u = eta^2 V_x / (beta e)."""
    noise = problem.eta**2

    def backward(tau: float, y: Array) -> Array:
        P, p, _ = y
        F, h = problem.drift(tau)
        return np.array(
            [
                -2 * F * P + noise * P**2 / beta - problem.state_cost,
                -F * p + h * P + noise * P * p / beta,
                -h * p + noise * P / 2 - noise * p**2 / (2 * beta),
            ]
        )

    scale = noise / (beta * problem.gain)
    return _solution(problem, beta, backward, lambda tau, value: scale * np.array([-value[0], value[1]]))


def _solution(
    problem: Lqg,
    beta: float,
    backward: Callable[[float, Array], Array],
    policy: Callable[[float, Array], Array],
) -> Solution:
    """Solve for the value function back from tau = T, then forward for the moments and everything integrated along them."""
    ends = {"method": "DOP853", "rtol": 1e-13, "atol": 1e-13, "dense_output": True}
    value = solve_ivp(backward, (problem.T, 0.0), [problem.Q, problem.q, 0.0], **ends).sol

    def forward(tau: float, y: Array) -> Array:
        mean, variance = y[:2]
        (F, h), (P, p, _) = problem.drift(tau), value(tau)
        a, b = policy(tau, value(tau))
        F, h, square = F + problem.gain * a, h + problem.gain * b, mean**2 + variance
        price = beta * problem.price
        return np.array(
            [
                F * mean + h,
                2 * F * variance + problem.eta**2,
                problem.gain * (-P * square + p * mean) - price * (a * square + b * mean),
                problem.gain * (-P * mean + p) - price * (a * mean + b),
                problem.price / 2 * (a**2 * square + 2 * a * b * mean + b**2),
            ]
        )

    mean, variance, dK, dk, kl = solve_ivp(forward, (0.0, problem.T), [*problem.start(), 0.0, 0.0, 0.0], **ends).y[:, -1]
    size = problem.dimension
    return Solution(
        objective=problem.objective(value(0.0)),
        gradient=(float(size * dK), float(size * dk)),
        mean=float(mean),
        variance=float(variance),
        path_kl=float(size * kl),
        value=value,
        policy=lambda tau: policy(tau, value(tau)),
    )


def evaluate_chain(problem: Lqg, beta: float, K: Array, k: Array) -> Solution:
    """The affine policies u_n = K_n x + k_n, [N] each, of the Euler-Maruyama chain of N uniform steps."""
    return _chain_solution(problem, beta, len(K), lambda n, P, p: (float(K[n]), float(k[n])))


def chain_optimum(problem: Lqg, beta: float, num_inference_steps: int) -> Solution:
    """The optimal policies of that chain: u_n(x) = e (p_{n+1} - P_{n+1} m_n(x)) / (beta w + e^2 D P_{n+1})."""
    step = problem.T / num_inference_steps

    def best(n: int, P: float, p: float) -> tuple[float, float]:
        F, h = problem.drift(n * step)
        scale = problem.gain / (beta * problem.price + problem.gain**2 * step * P)
        return -scale * P * (1 + F * step), scale * (p - P * h * step)

    return _chain_solution(problem, beta, num_inference_steps, best)


def _chain_solution(
    problem: Lqg, beta: float, steps: int, policy: Callable[[int, float, float], tuple[float, float]]
) -> Solution:
    """X' = A X + B + eta sqrt(D) eps, A = 1 + (F + e K) D, B = (h + e k) D; `policy`: n, P_{n+1}, p_{n+1} -> (K_n, k_n)."""
    D, price, states = problem.T / steps, beta * problem.price, problem.state_cost * problem.spans(steps)
    values, policies, maps = np.empty((steps + 1, 3)), np.empty((steps, 2)), np.empty((steps, 2))
    values[steps] = problem.Q, problem.q, 0.0
    for n in range(steps - 1, -1, -1):
        P, p, c = values[n + 1]
        (F, h), (K, k) = problem.drift(n * D), policy(n, P, p)
        A, B = 1 + (F + problem.gain * K) * D, (h + problem.gain * k) * D
        values[n] = (
            A**2 * P + price * K**2 * D + states[n],
            A * (p - B * P) - price * K * k * D,
            c + p * B - P * B**2 / 2 - P * problem.eta**2 * D / 2 - price * k**2 * D / 2,
        )
        policies[n], maps[n] = (K, k), (A, B)

    (mean, variance), dK, dk, kl = problem.start(), 0.0, 0.0, 0.0
    for n in range(steps):
        (P, p, _), (K, k), (A, B) = values[n + 1], policies[n], maps[n]
        square = mean**2 + variance
        dK += D * (problem.gain * (-P * (A * square + B * mean) + p * mean) - price * (K * square + k * mean))
        dk += D * (problem.gain * (-P * (A * mean + B) + p) - price * (K * mean + k))
        kl += D * problem.price / 2 * (K**2 * square + 2 * K * k * mean + k**2)
        mean, variance = A * mean + B, A**2 * variance + problem.eta**2 * D
    size = problem.dimension
    return Solution(
        objective=problem.objective(values[0]),
        gradient=(size * float(dK), size * float(dk)),
        mean=float(mean),
        variance=float(variance),
        path_kl=size * float(kl),
        value=lambda n: values[int(n)],
        policy=lambda n: policies[int(n)],
    )


def control_error(problem: Lqg, best: Solution, K: Array, k: Array) -> float:
    """sqrt(E sum |u - u*|^2 / E sum |u*|^2) of policies K, k [N] over the chain's optimal process."""
    (mean, variance), wrong, right, D = problem.start(), 0.0, 0.0, problem.T / len(K)
    for n in range(len(K)):
        (slope, intercept), (F, h), square = best.policy(n), problem.drift(n * D), mean**2 + variance
        a, b = K[n] - slope, k[n] - intercept
        wrong += a**2 * square + 2 * a * b * mean + b**2
        right += slope**2 * square + 2 * slope * intercept * mean + intercept**2
        A, B = 1 + (F + problem.gain * slope) * D, (h + problem.gain * intercept) * D
        mean, variance = A * mean + B, A**2 * variance + problem.eta**2 * D
    return float((wrong / right) ** 0.5) if right > 0 else float((wrong / len(K)) ** 0.5)
