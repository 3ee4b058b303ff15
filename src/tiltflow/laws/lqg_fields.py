"""The linear-quadratic-Gaussian problem's base, affine policies and value functions, as networks and flows."""

# Mutation tests: test_lqg.py test_score_as_action.py

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import VariancePreserving
from tiltflow.laws.gaussian_mixture import QuadraticReward
from tiltflow.laws.lqg import Lqg, Solution, pace
from tiltflow.networks.quadratic import chebyshev


class LinearPolicy(nn.Module):
    """Epsilon of the score -(x - a m) / v + K(s) x + k(s), in the diffusion's own coordinates, for x [batch, dimension] and its
    time s [batch] in [0, 1]. K and k are Chebyshev polynomials of s, 0 at the start."""

    def __init__(self, problem: Lqg, degree: int):
        super().__init__()
        self.problem, self.coefficients = problem, nn.Parameter(torch.zeros(2, degree + 1))

    def at(self, s: Tensor) -> Tensor:
        """K and k: [2, batch]."""
        policy: Tensor = self.coefficients @ chebyshev(s, self.coefficients.shape[1] - 1)
        return policy

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return epsilon(self.problem, x, s, *self.at(s))


class OnePolicyEach(nn.Module):
    """The constant policy (K, k), as one pair of parameters for each of `batch` trajectories, so that the gradient of a batch
    is that of its trajectories one by one."""

    def __init__(self, problem: Lqg, batch: int):
        super().__init__()
        self.problem = problem
        self.coefficients = nn.Parameter(torch.tensor([[problem.K], [problem.k]]).expand(2, batch).clone())

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return epsilon(self.problem, x, s, *self.coefficients)


class QuadraticValue(nn.Module):
    """The exact value function of a chain of N steps: (x [batch, dimension] on the linear path, time [batch]) -> [batch, 1]."""

    def __init__(self, problem: Lqg, solution: Solution, times: Tensor):
        super().__init__()
        table = np.array([solution.value(n) for n in range(len(times))])
        self.times, self.table, self.scale = times, torch.from_numpy(table), own_scale(times)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        step = torch.bucketize(time.double().contiguous(), (self.times[:-1] + self.times[1:]) / 2)
        P, p, c = self.table.to(x)[step, :, None].unbind(1)
        own = x * self.scale.to(x)[step, None]
        value: Tensor = -P * own.square() / 2 + p * own + c
        return value.sum(1, keepdim=True)


def own_scale(t: Tensor) -> Tensor:
    """alpha + beta: what turns a state on the linear path at time t into the diffusion's own coordinates."""
    return 1 / torch.hypot(t, 1 - t)


def interpolant(problem: Lqg) -> VariancePreserving:
    """The problem's diffusion: its noise passes at rate 1 for T units of time."""
    return VariancePreserving(beta_min=problem.T, beta_max=problem.T)


def epsilon(problem: Lqg, x: Tensor, s: Tensor, K: Tensor, k: Tensor) -> Tensor:
    """-beta(s) (score + K x + k) for x [batch, dimension] and s, K, k [batch]."""
    square = torch.exp(problem.T * (s - 1))[:, None]
    score = -(x - square.sqrt() * problem.mean) / (square * problem.variance + 1 - square)
    predicted: Tensor = -(1 - square).sqrt() * (score + K[:, None] * x + k[:, None])
    return predicted


def base_flow(problem: Lqg) -> Flow:
    """The exact base."""
    return Flow(LinearPolicy(problem, 0).requires_grad_(False), "epsilon", interpolant(problem))


def draw_start(problem: Lqg, count: int, start: float, generator: torch.Generator) -> Tensor:
    """X_0 on the linear path: [count, dimension]."""
    mean, variance = problem.start()
    noise = torch.randn(count, problem.dimension, generator=generator, dtype=torch.get_default_dtype())
    x: Tensor = mean + variance**0.5 * noise
    return x / own_scale(torch.tensor(start, dtype=torch.float64)).item()


def reward_of(problem: Lqg) -> QuadraticReward:
    """q x - Q x^2 / 2, summed over the coordinates."""
    return QuadraticReward(torch.full((problem.dimension,), problem.q, dtype=torch.float64), problem.Q)


def running_reward_of(problem: Lqg) -> Callable[[Tensor, Tensor], Tensor] | None:
    """(x [batch, dimension] on the linear path, t []) -> [batch]: -R X^2 / 2 per unit of time on that path, summed over the
    coordinates, X being the state in the diffusion's own coordinates; None where R is 0."""
    if problem.state_cost == 0:
        return None

    def running(x: Tensor, t: Tensor) -> Tensor:
        own, now = x * own_scale(t), torch.as_tensor(pace(t.double().numpy())).to(x)
        return -problem.state_cost / 2 * now * own.square().sum(1)

    return running
