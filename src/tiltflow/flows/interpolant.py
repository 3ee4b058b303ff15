r"""Interpolants: how data and noise mix along time.

The convention of the whole library: time runs from noise, t = 0, to data, t = 1, and

    x_t = alpha(t) x_1 + beta(t) x_0,      x_1 ~ data,  x_0 ~ N(0, I).

Every such path is the linear one in other coordinates (checked in the tests):

    z = x / (alpha + beta),   t = alpha / (alpha + beta)    =>    z = t x_1 + (1 - t) x_0.

x_1 and x_0 do not change. So a sampler, an adjoint or a method is written once, for the linear path, and an
interpolant has only to say how its own time and coordinates map to it. On the linear path the velocity is
v = x_1 - x_0 (both as posterior means), x_1 = z + (1 - t) v and x_0 = z - t v: singular nowhere.
"""

# Mutation tests: test_interpolant.py test_flow.py

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.settings import Settings

PredictionType = Literal["velocity", "epsilon", "v", "x1"]
Quantity = Literal["velocity", "epsilon", "v", "x1", "score"]


@dataclass(frozen=True)
class Coefficients:
    """alpha, beta and their derivatives in the interpolant's own time, all of the shape of that time."""

    alpha: Tensor
    beta: Tensor
    d_alpha: Tensor
    d_beta: Tensor

    @property
    def kappa(self) -> Tensor:
        """alpha' / alpha, the linear drift of the noising process (2409.08861, eq. 11). Infinite where alpha = 0."""
        return self.d_alpha / self.alpha

    @property
    def eta(self) -> Tensor:
        """beta (kappa beta - beta'), half the squared noise level of the noising process (2409.08861, eq. 11)."""
        return self.beta * (self.kappa * self.beta - self.d_beta)

    @property
    def memoryless_sigma(self) -> Tensor:
        """sqrt(2 eta): the noise level whose process forgets x_0 and may be tuned without bias (2409.08861, Theorem 1)."""
        return (2 * self.eta).sqrt()


class Linear(Settings):
    """alpha = t, beta = 1 - t: flow matching, rectified flow, Stable Diffusion 3, FLUX."""

    name: Literal["linear"] = "linear"

    def __call__(self, s: Tensor) -> Coefficients:
        one = torch.ones_like(s)
        return Coefficients(s, 1 - s, one, -one)

    def own_time(self, t: Tensor) -> Tensor:
        return t

    def network_time(self, s: Tensor) -> Tensor:
        return s


class Cosine(Settings):
    """alpha = sin(pi s / 2), beta = cos(pi s / 2): variance preserving, with an exact end on both sides."""

    name: Literal["cosine"] = "cosine"

    def __call__(self, s: Tensor) -> Coefficients:
        half_pi = math.pi / 2
        alpha, beta = torch.sin(half_pi * s), torch.cos(half_pi * s)
        return Coefficients(alpha, beta, half_pi * beta, -half_pi * alpha)

    def own_time(self, t: Tensor) -> Tensor:
        return torch.atan2(t, 1 - t) * (2 / math.pi)

    def network_time(self, s: Tensor) -> Tensor:
        return s


class VariancePreserving(Settings):
    r"""The continuous variance-preserving diffusion: with u = 1 - s the time of the noising process,

    alpha^2 = exp(-beta_min u - (beta_max - beta_min) u^2 / 2),  beta^2 = 1 - alpha^2     (2011.13456, eq. 33).

    alpha(0) is small but not zero (0.0066 at the defaults); beta' is infinite at s = 1.
    """

    name: Literal["variance-preserving"] = "variance-preserving"
    beta_min: Annotated[float, Field(gt=0)] = 0.1
    """Rate of the noise at the data."""
    beta_max: Annotated[float, Field(gt=0)] = 20.0
    """Rate of the noise at the noise end."""

    def __call__(self, s: Tensor) -> Coefficients:
        u, slope = 1 - s, self.beta_max - self.beta_min
        log_square = -(self.beta_min * u + slope * u**2 / 2)
        return _variance_preserving(log_square.exp(), log_square.exp() * (self.beta_min + slope * u), -torch.expm1(log_square))

    def own_time(self, t: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        minus_log = -torch.log(_square_alpha(t).clamp(min=torch.finfo(t.dtype).tiny))
        # the positive root of slope u^2 / 2 + beta_min u = -log alpha^2, in the form that does not cancel
        u = 2 * minus_log / (self.beta_min + (self.beta_min**2 + 2 * slope * minus_log).sqrt())
        return (1 - u).clamp(0, 1)

    def network_time(self, s: Tensor) -> Tensor:
        return s


class DiscreteVariancePreserving(Settings):
    r"""A discrete diffusion schedule, named and computed as in diffusers' schedulers.

    Timestep i = 0 .. T - 1 (large is noisy) has alpha^2 = prod_{j <= i} (1 - beta_j). It sits at s = 1 - (i + 1) / T,
    so that s = 1 is clean data; between the timesteps alpha^2 is linear. The network is asked at the real-valued
    timestep T (1 - s) - 1. alpha at s = 0 is that of the last timestep's noise level, small but not zero.
    """

    name: Literal["discrete-variance-preserving"] = "discrete-variance-preserving"
    num_train_timesteps: Annotated[int, Field(gt=1)] = 1000
    """Steps of the diffusion."""
    beta_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Variance of the noise of the first step, at the data."""
    beta_end: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Variance of the noise of the last step."""
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    """How the variances lie between them, as diffusers names it; squaredcos_cap_v2 has its own."""
    rescale_betas_zero_snr: bool = False
    """Shift and scale alpha so that the last timestep holds no data at all (2305.08891, algorithm 1)."""

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 at the knots s = 0, 1/T, .., 1: shape [T + 1], float64, increasing to 1."""
        steps = self.num_train_timesteps
        if self.beta_schedule == "squaredcos_cap_v2":
            u = torch.arange(steps + 1, dtype=torch.float64) / steps
            bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        else:
            power = 0.5 if self.beta_schedule == "scaled_linear" else 1.0
            betas = torch.linspace(self.beta_start**power, self.beta_end**power, steps, dtype=torch.float64) ** (1 / power)
        noisy_first = torch.cumprod(1 - betas, 0).flip(0)
        if self.rescale_betas_zero_snr:
            alpha = noisy_first.sqrt()
            noisy_first = ((alpha - alpha[0]) * alpha[-1] / (alpha[-1] - alpha[0])) ** 2
        return torch.cat([noisy_first, noisy_first.new_ones(1)])

    def __call__(self, s: Tensor) -> Coefficients:
        knots = self.alphas_cumprod.to(s)
        position = s.clamp(0, 1) * self.num_train_timesteps
        left = position.floor().long().clamp(max=self.num_train_timesteps - 1)
        slope = knots[left + 1] - knots[left]
        square = knots[left] + (position - left) * slope
        return _variance_preserving(square, slope * self.num_train_timesteps, 1 - square)

    def own_time(self, t: Tensor) -> Tensor:
        knots, square = self.alphas_cumprod.to(t), _square_alpha(t)
        left = (torch.searchsorted(knots, square, right=True) - 1).clamp(0, self.num_train_timesteps - 1)
        inside = (square - knots[left]) / (knots[left + 1] - knots[left])
        return ((left + inside) / self.num_train_timesteps).clamp(0, 1)

    def network_time(self, s: Tensor) -> Tensor:
        return (self.num_train_timesteps * (1 - s) - 1).clamp(min=0)


Interpolant = Linear | Cosine | VariancePreserving | DiscreteVariancePreserving


def _square_alpha(t: Tensor) -> Tensor:
    """alpha^2 of any variance-preserving path at linear time t: alpha / beta = t / (1 - t) and alpha^2 + beta^2 = 1."""
    return t**2 / (t**2 + (1 - t) ** 2)


def _variance_preserving(square: Tensor, d_square: Tensor, beta_square: Tensor) -> Coefficients:
    alpha, beta = square.sqrt(), beta_square.sqrt()
    return Coefficients(alpha, beta, d_square / (2 * alpha), -d_square / (2 * beta))


def linear_time(interpolant: Interpolant, s: Tensor) -> Tensor:
    """t = alpha / (alpha + beta): the time at which the linear path holds the same pair (x_1, x_0)."""
    c = interpolant(s)
    return c.alpha / (c.alpha + c.beta)


def interior(s: Tensor) -> Tensor:
    """`s` kept sqrt(machine epsilon) away from both ends: where conversions are singular, they stay finite and invertible."""
    margin = torch.finfo(s.dtype).eps ** 0.5
    return s.clamp(margin, 1 - margin)


def mixture_weights(quantity: Quantity, c: Coefficients) -> tuple[Tensor, Tensor]:
    """(a, b) such that the quantity is a x_1 + b x_0. 'v' is the diffusion v-prediction, alpha x_0 - beta x_1 (2202.00512)."""
    zero, one = torch.zeros_like(c.alpha), torch.ones_like(c.alpha)
    table: dict[Quantity, tuple[Tensor, Tensor]] = {
        "velocity": (c.d_alpha, c.d_beta),
        "epsilon": (zero, one),
        "v": (-c.beta, c.alpha),
        "x1": (one, zero),
        "score": (zero, -1 / c.beta),
    }
    return table[quantity]


def convert(value: Tensor, x: Tensor, s: Tensor, interpolant: Interpolant, source: Quantity, target: Quantity) -> Tensor:
    """One prediction from another, at the same x and time: velocity, epsilon, v, x1 (denoised) or score.

    All five are a x_1 + b x_0 for known (a, b), and so is x itself: one 2x2 system, solved once, serves every pair.

    Args:
        value: the quantity named by `source`, [batch, *event].
        x: the state, in the interpolant's own coordinates, [batch, *event].
        s: the interpolant's own time in [0, 1], [] or [batch]; moved sqrt(eps) off the ends, so that the result is
            finite everywhere and the way back is the inverse, to about sqrt(eps) of its size.
    """
    c = interpolant(interior(s))
    a, b = mixture_weights(source, c)
    det = expand(c.alpha * b - c.beta * a, x)
    alpha, beta, a, b = (expand(w, x) for w in (c.alpha, c.beta, a, b))
    x1, x0 = (b * x - beta * value) / det, (alpha * value - a * x) / det
    a, b = (expand(w, x) for w in mixture_weights(target, c))
    return a * x1 + b * x0


def expand(c: Tensor, x: Tensor) -> Tensor:
    """`c`, [] or [batch], shaped to multiply `x`, [batch, *event], in x's dtype and on its device."""
    if c.ndim == 0:
        return c.to(x)
    if c.shape != x.shape[:1]:
        raise ValueError(f"a time or coefficient must be [] or [{len(x)}] to match x {list(x.shape)}, got {list(c.shape)}")
    return c.to(x).reshape(-1, *(1 for _ in x.shape[1:]))
