"""The standard problem of these tests, worked out by hand: data N(0.7, 0.25) in one dimension under r(x) = 1.7 x - 3 x^2 / 2.

There the velocity is affine in x, so every chain is X_{k+1} = gain_k X_k + offset_k + std_k eps_k: laws, correlations and
optimal controls are recursions of two numbers. Of the library this uses nothing but the three numbers a step of a chain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiltflow.samplers.chain import Chain

MEAN, VARIANCE = 0.7, 0.25
LINEAR, QUADRATIC = 1.7, 3.0
TILTED_VARIANCE = 1 / (1 / VARIANCE + QUADRATIC)
TILTED_MEAN = TILTED_VARIANCE * (MEAN / VARIANCE + LINEAR)


def slope(t: Tensor, variance: float = VARIANCE) -> Tensor:
    """A(t) of v = m + A (x - t m), the velocity of N(m, variance) on the linear path."""
    return (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)


def velocity(x: Tensor, t: Tensor, mean: float = MEAN, variance: float = VARIANCE) -> Tensor:
    return mean + slope(t, variance) * (x - t * mean)


@dataclass(frozen=True)
class Affine:
    """X_{k+1} = gain X_k + offset + std eps, [K] each."""

    gain: Tensor
    offset: Tensor
    std: Tensor

    def law(self, mean: float | Tensor = 0.0, variance: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """Mean and variance of X_K for X_0 of the given mean and variance."""
        mean, variance = torch.as_tensor(mean), torch.as_tensor(variance)
        for gain, offset, std in zip(self.gain, self.offset, self.std, strict=True):
            mean, variance = gain * mean + offset, gain**2 * variance + std**2
        return mean, variance

    def controlled(self, slope: Tensor, shift: Tensor) -> Affine:
        """The chain under the controls w_k(x) = slope_k x + shift_k, in units of the noise."""
        return Affine(self.gain + self.std * slope, self.offset + self.std * shift, self.std)

    def path_kl(self, slope: Tensor, shift: Tensor) -> Tensor:
        """sum_k E |w_k|^2 / 2 along the controlled chain, from X_0 ~ N(0, 1)."""
        tuned, total = self.controlled(slope, shift), torch.zeros(())
        mean, variance = torch.zeros(()), torch.ones(())
        for k in range(len(slope)):
            total = total + ((slope[k] * mean + shift[k]) ** 2 + slope[k] ** 2 * variance) / 2
            mean = tuned.gain[k] * mean + tuned.offset[k]
            variance = tuned.gain[k] ** 2 * variance + tuned.std[k] ** 2
        return total


def on_gaussian(chain: Chain, mean: float = MEAN, variance: float = VARIANCE) -> Affine:
    """The chain with the exact velocity of N(mean, variance)."""
    t = chain.times[:-1]
    return Affine(
        chain.x_scale + chain.v_scale * slope(t, variance), chain.v_scale * mean * (1 - slope(t, variance) * t), chain.std
    )


class Controlled(nn.Module):
    """The velocity of N(MEAN, VARIANCE) under the controls w_k(x) = slope_k x + shift_k of a chain, [K] each, in units of its
    noise; of a chain without noise they are added to the velocity."""

    def __init__(self, chain: Chain, slope: Tensor | None = None, shift: Tensor | None = None):
        super().__init__()
        self.times, zero = chain.times, torch.zeros(len(chain))
        self.scale = torch.where(chain.control_scale > 0, chain.control_scale, 1.0)
        given = (zero if each is None else each for each in (slope, shift))
        self.slope, self.shift = (nn.Parameter(each.clone().to(zero)) for each in given)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        k = (t.reshape(-1, 1) - self.times).abs().argmin(1)
        control = (self.slope[k, None] * x + self.shift[k, None]) / self.scale[k, None].to(x)
        return velocity(x, t.reshape(-1, 1)) + control


def riccati(
    chain: Affine, linear: float = LINEAR, quadratic: float = QUADRATIC, running: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The optimal controls w_k(x) = slope_k x + shift_k, [K] each, for the terminal cost quadratic x^2 / 2 - linear x.

    The value function after step k is P x^2 / 2 + p x + const; minimise w^2 / 2 + E of it over w.

    Args:
        running: (Q, q), [K] each: step k costs Q_k x_k^2 / 2 + q_k x_k.
    """
    P, p = torch.tensor(quadratic), torch.tensor(-linear)
    slopes, shifts = [], []
    Q, q = (torch.zeros(len(chain.gain)),) * 2 if running is None else running
    steps = zip(*(each.flip(0) for each in (chain.gain, chain.offset, chain.std, Q, q)), strict=True)
    for gain, offset, std, Q_k, q_k in steps:
        d = 1 + P * std**2
        slopes.append(-std * P * gain / d)
        shifts.append(-std * (P * offset + p) / d)
        P, p = gain**2 * P / d + Q_k, gain * (P * offset + p) / d + q_k
    return torch.stack(slopes).flip(0), torch.stack(shifts).flip(0)
