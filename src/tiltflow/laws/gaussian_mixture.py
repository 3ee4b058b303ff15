r"""Gaussian mixtures under linear and quadratic rewards: laws, velocity fields, tilts and optimal controls in closed form.

The base is the exact velocity field of a law p = sum_i w_i N(m_i, s_i^2 I) on the linear path, so no pretraining error
hides the error of a method. The reward is r(x) = c.x - q |x|^2 / 2, whose tilt exp(r / beta) keeps p a Gaussian mixture:
target law, optimal control and value function are closed forms.
"""

# Mutation tests: test_problems.py

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiltflow.flows.interpolant import expand

Vector = float | tuple[float, ...]


@dataclass(frozen=True)
class QuadraticReward:
    """r(x) = linear . x - quadratic |x|^2 / 2, for x [batch, dimension]."""

    linear: Tensor
    quadratic: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.linear.to(x) - self.quadratic / 2 * x.square().sum(1)


@dataclass(frozen=True)
class GaussianMixture:
    """sum_i w_i N(m_i, s_i^2 I): log_weights [n] (normalised), means [n, dimension], variances [n], all float64."""

    log_weights: Tensor
    means: Tensor
    variances: Tensor

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, dimension] exact samples, float64."""
        component = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[component] + self.variances[component, None].sqrt() * noise

    @property
    def mean(self) -> Tensor:
        return self.log_weights.exp() @ self.means

    def expectation(self, reward: QuadraticReward) -> float:
        """E r(x), in closed form."""
        squares = self.means.square().sum(1) + self.variances * self.means.shape[1]
        values = self.means @ reward.linear.double() - reward.quadratic / 2 * squares
        return float(self.log_weights.exp() @ values)

    def log_partition(self, reward: QuadraticReward, beta: float) -> float:
        """log E exp(r / beta)."""
        return float(torch.logsumexp(self.log_weights + self._log_tilts(self.means, self.variances, reward, beta), 0))

    def tilt(self, reward: QuadraticReward, beta: float) -> GaussianMixture:
        """The law proportional to p exp(r / beta): again a mixture, s~^2 = 1 / (1/s^2 + q/beta), m~ = s~^2 (m/s^2 + c/beta)."""
        variances = 1 / (1 / self.variances + reward.quadratic / beta)
        means = variances[:, None] * (self.means / self.variances[:, None] + reward.linear.double() / beta)
        log_weights = self.log_weights + self._log_tilts(self.means, self.variances, reward, beta)
        return GaussianMixture(log_weights - torch.logsumexp(log_weights, 0), means, variances)

    def projected(self, basis: Tensor) -> GaussianMixture:
        """The law of the coordinates x @ basis, for orthonormal columns [dimension, k]: again such a mixture."""
        return GaussianMixture(self.log_weights, self.means @ basis, self.variances)

    @staticmethod
    def _log_tilts(means: Tensor, variances: Tensor, reward: QuadraticReward, beta: float) -> Tensor:
        """log E exp(r / beta) under N(means, variances): [.., dimension] and [..] -> [..]."""
        c, q, dimension = reward.linear.to(means) / beta, reward.quadratic / beta, means.shape[-1]
        spread = 1 + q * variances
        exponent = means @ c + c.square().sum() * variances / 2 - q * means.square().sum(-1) / 2
        return exponent / spread - dimension / 2 * spread.log()

    def _components_at(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The law of x_t: (log responsibilities of the components for x [batch, n], the time [batch or 1, 1], the components'
        variances [batch or 1, n], and x minus their means [batch, n, dimension])."""
        time = expand(t, x).reshape(-1, 1)
        total = time**2 * self.variances.to(x) + (1 - time) ** 2
        away = x[:, None] - time[..., None] * self.means.to(x)
        log_density = -away.square().sum(2) / (2 * total) - x.shape[1] / 2 * total.log()
        return torch.log_softmax(self.log_weights.to(x) + log_density, 1), time, total, away

    def posterior(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior of the component and of its data point, given x_t = x [batch, dimension] at t [] or [batch].

        Returns (log responsibilities [batch, n], means of x_1 [batch, n, dimension], variances of x_1 [batch or 1, n]).
        """
        log_responsibility, time, total, away = self._components_at(x, t)
        means, variances = self.means.to(x), self.variances.to(x)
        return log_responsibility, means + (time * variances / total)[..., None] * away, variances * (1 - time) ** 2 / total

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_1 - x_0 | x_t = x] at t [] or [batch]: [batch, dimension], finite on all of [0, 1]."""
        return self.velocity_and_responsibilities(x, t)[0]

    def velocity_and_responsibilities(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """`velocity`, and the probability of each component given x_t = x [batch, n]."""
        log_responsibility, time, total, away = self._components_at(x, t)
        slope = (time * self.variances.to(x) - (1 - time)) / total
        responsibility = log_responsibility.exp()
        return (responsibility[..., None] * (self.means.to(x) + slope[..., None] * away)).sum(1), responsibility

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x) of the linear path: [batch, dimension], finite on all of [0, 1]."""
        log_responsibility, _, total, away = self._components_at(x, t)
        return -(log_responsibility.exp()[..., None] * away / total[..., None]).sum(1)

    def value(self, x: Tensor, t: Tensor, reward: QuadraticReward, beta: float) -> Tensor:
        """V(x, t) = -log E[exp(r(x_1) / beta) | x_t = x] (2409.08861, eq. 14): [batch]. The optimal control: -sigma grad V."""
        log_responsibility, means, variances = self.posterior(x, t)
        return -torch.logsumexp(log_responsibility + self._log_tilts(means, variances, reward, beta), 1)


def span_of_tilt(base: GaussianMixture, target: GaussianMixture, reward: QuadraticReward) -> Tensor:
    """Orthonormal columns [dimension, k] that span the means of both laws and the direction of the reward: across it all
    components are centred, and the tilt shows in their widths alone. A coordinate axis where all of these are 0."""
    vectors = torch.cat([base.means, target.means, reward.linear.double()[None]])
    left, sizes, _ = torch.linalg.svd(vectors.T, full_matrices=False)
    basis: Tensor = left[:, : max(int((sizes > 1e-9 * sizes[0]).sum()), 1)]
    return basis


def optimal_control(base: GaussianMixture, target: GaussianMixture, x: Tensor, t: Tensor) -> Tensor:
    """u* = (2 / sigma) (v* - v) with the memoryless sigma (2409.08861, eq. 26), at 0 < t < 1: [batch, dimension]."""
    sigma = expand((2 * (1 - t) / t).sqrt(), x)
    return 2 / sigma * (target.velocity(x, t) - base.velocity(x, t))


def lean_propagator(variance: float, t: Tensor) -> Tensor:
    """Phi(t) = t s^2 / (t^2 s^2 + (1 - t)^2): on a base N(m, s^2 I) the lean adjoint is a(t) = Phi(t) a(1)."""
    return t * variance / (t**2 * variance + (1 - t) ** 2)


class ExactVelocity(nn.Module):
    """The velocity field of a mixture as a network without parameters."""

    def __init__(self, law: GaussianMixture):
        super().__init__()
        self.law = law

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.law.velocity(x, time)


class CorrectedVelocity(nn.Module):
    """An exact velocity plus a learned correction, zero at the start."""

    def __init__(self, base: nn.Module, correction: nn.Module):
        super().__init__()
        self.base, self.correction = base, correction

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.base(x, time) + self.correction(x, time)  # type: ignore[no-any-return]


def mixture(means: Tensor, weights: tuple[float, ...], scale: float | tuple[float, ...]) -> GaussianMixture:
    """The mixture with these means [n, dimension], weights of any sum, and one standard deviation or one for each."""
    log_weights = torch.tensor(weights, dtype=torch.float64).log()
    return GaussianMixture(log_weights - torch.logsumexp(log_weights, 0), means, vector(scale, len(means)) ** 2)


def vector(value: Vector, size: int) -> Tensor:
    """One number for all entries, or a list whose missing entries are 0: [size], float64."""
    if not isinstance(value, tuple):
        return torch.full((size,), value, dtype=torch.float64)
    return torch.tensor([*value, *(0.0 for _ in range(size - len(value)))], dtype=torch.float64)
