r"""Problems with known answers: Gaussian and Gaussian-mixture bases under linear and quadratic rewards.

The base is the exact velocity field of a law p = sum_i w_i N(m_i, s_i^2 I) on the linear path, so no pretraining error
hides the error of a method. The reward is r(x) = c.x - q |x|^2 / 2, whose tilt exp(r / beta) keeps p a Gaussian mixture:
target law, optimal control and value function are closed forms.
"""

# Mutation tests: test_problems.py

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tiltflow.flows.interpolant import expand
from tiltflow.laws.induced_law import Array, Law, log_normal
from tiltflow.settings import Settings

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
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
        """Which component, and where its data point is, given x_t = x [batch, dimension] on the linear path at t [] or [batch].

        Returns (log responsibilities [batch, n], means of x_1 [batch, n, dimension], variances of x_1 [batch or 1, n]).
        """
        log_responsibility, time, total, away = self._components_at(x, t)
        means, variances = self.means.to(x), self.variances.to(x)
        return log_responsibility, means + (time * variances / total)[..., None] * away, variances * (1 - time) ** 2 / total

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_1 - x_0 | x_t = x] at t [] or [batch]: [batch, dimension], finite on all of [0, 1]."""
        log_responsibility, time, total, away = self._components_at(x, t)
        slope = (time * self.variances.to(x) - (1 - time)) / total
        return (log_responsibility.exp()[..., None] * (self.means.to(x) + slope[..., None] * away)).sum(1)

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


class Problem(Settings):
    """A reward on a base law of some dimension; the laws are below."""

    dimension: Annotated[int, Field(ge=1)] = 2
    """Of x."""
    linear: Vector = 0.0
    """c of the reward c.x - q |x|^2 / 2: one number for all coordinates, or a list whose missing numbers are 0."""
    quadratic: NotNegative = 0.0
    """q of the reward."""

    def reward(self) -> QuadraticReward:
        return QuadraticReward(_vector(self.linear, self.dimension), self.quadratic)

    @model_validator(mode="after")
    def _check_lengths(self) -> Problem:
        for name in ("linear", "mean"):
            value = getattr(self, name, 0.0)
            if isinstance(value, tuple) and len(value) > self.dimension:
                raise ValueError(f"{name} has {len(value)} numbers, dimension is {self.dimension}")
        return self


class Gaussian(Problem):
    """A Gaussian base N(mean, scale^2 I) under a linear or quadratic reward."""

    name: Literal["gaussian"] = "gaussian"
    mean: Vector = 0.7
    """Of the base: one number for all coordinates, or a list whose missing numbers are 0."""
    scale: Positive = 0.5
    """Standard deviation of the base."""
    linear: Vector = 1.7

    def base(self) -> GaussianMixture:
        return _mixture(_vector(self.mean, self.dimension)[None], (1.0,), self.scale)


class Mixture(Problem):
    """A mixture of Gaussians under a linear or quadratic reward: a ring of equal ones, unless `means` are given."""

    name: Literal["mixture"] = "mixture"
    modes: Annotated[int, Field(ge=1)] = 8
    """How many are on the ring."""
    radius: NotNegative = 2.0
    """Of the ring, in the first two coordinates."""
    means: Annotated[tuple[tuple[float, ...], ...], Field(min_length=1)] | None = None
    """One list for each mode, instead of the ring; missing numbers are 0."""
    weights: tuple[Positive, ...] | None = None
    """One number for each mode, of any sum; equal by default."""
    scale: Positive | tuple[Positive, ...] = 0.6
    """Standard deviation of the modes: one for all, or one for each."""
    linear: Vector = (1.0, 0.5)

    @model_validator(mode="after")
    def _check_modes(self) -> Mixture:
        if self.means is None and self.dimension < 2:
            raise ValueError("a ring needs dimension 2 or more; give means=[[..], ..] instead")
        if self.means is not None and max((len(mean) for mean in self.means), default=0) > self.dimension:
            raise ValueError(f"a mean has more numbers than dimension {self.dimension}")
        modes = self.modes if self.means is None else len(self.means)
        for name, value in (("weights", self.weights), ("scale", self.scale)):
            if isinstance(value, tuple) and len(value) != modes:
                raise ValueError(f"{name} has {len(value)} numbers for {modes} modes")
        return self

    def base(self) -> GaussianMixture:
        if self.means is not None:
            means = torch.stack([_vector(mean, self.dimension) for mean in self.means])
        else:
            angle = torch.arange(self.modes, dtype=torch.float64) * (2 * math.pi / self.modes)
            means = torch.zeros(self.modes, self.dimension, dtype=torch.float64)
            means[:, 0], means[:, 1] = self.radius * angle.cos(), self.radius * angle.sin()
        return _mixture(means, self.weights or (1.0,) * len(means), self.scale)


class TwoModes(Settings):
    """Two equal modes in one dimension under the bounded reward tanh(x): every method's law is known."""

    name: Literal["two-modes"] = "two-modes"
    separation: Positive = 1.5
    """The modes are at -separation and separation."""
    scale: Positive = 0.5
    """Standard deviation of each."""

    def base(self) -> GaussianMixture:
        return _mixture(torch.tensor([[-self.separation], [self.separation]], dtype=torch.float64), (1.0, 1.0), self.scale)

    def law(self) -> Law:
        """The base on a grid."""
        m, s = self.separation, self.scale
        return Law.of(lambda x: np.logaddexp(log_normal(x, -m, s), log_normal(x, m, s)))

    def reward(self) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.tanh(x[:, 0])

    @staticmethod
    def reward_at(x: Array) -> Array:
        """The same reward of points x [n]."""
        return np.tanh(x)


def _mixture(means: Tensor, weights: tuple[float, ...], scale: float | tuple[float, ...]) -> GaussianMixture:
    log_weights = torch.tensor(weights, dtype=torch.float64).log()
    return GaussianMixture(log_weights - torch.logsumexp(log_weights, 0), means, _vector(scale, len(means)) ** 2)


def _vector(value: Vector, size: int) -> Tensor:
    """One number for all entries, or a list whose missing entries are 0: [size], float64."""
    if not isinstance(value, tuple):
        return torch.full((size,), value, dtype=torch.float64)
    return torch.tensor([*value, *(0.0 for _ in range(size - len(value)))], dtype=torch.float64)
