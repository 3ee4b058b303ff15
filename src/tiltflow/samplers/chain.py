r"""Samplers as Markov chains of Gaussian steps.

Every sampler here that evaluates the network once a step is a chain of Gaussian steps on the linear path,

    x_{k+1} = x_scale_k x_k + v_scale_k v(x_k, t_k) + std_k eps_k,      k = 0 .. K - 1,  t_0 ~ 0 < .. < t_K = 1,

so a sampler is three numbers a step. With the same three numbers, a change of velocity v -> v + dv is the control
w_k = v_scale_k dv / std_k, the KL divergence between two chains is sum_k E|w_k|^2 / 2, exactly, and the adjoint of a
step is x_scale_k a + v_scale_k J_v^T a. No method needs to know which sampler it runs on.

Each of these chains is a file in `tiltflow.samplers.solvers`.
"""

# Mutation tests: test_sampler.py

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.flows.field import Velocity
from tiltflow.streams import Noise, normal


@dataclass(frozen=True)
class Chain:
    """A sampler on a time grid. `times` is [K + 1], the rest [K], all float64 on the CPU. `price`: see `energy`."""

    times: Tensor
    x_scale: Tensor
    v_scale: Tensor
    std: Tensor
    price: Tensor | None = None

    def __len__(self) -> int:
        return len(self.std)

    def velocity(self, k: int, velocity: Velocity, x: Tensor) -> Tensor:
        """What step k asks of a velocity at x_k = x [batch, *event]: its value at t_k."""
        return velocity(x, self.times[k])

    def mean(self, k: int, x: Tensor, v: Tensor) -> Tensor:
        """The mean of x_{k+1} given x_k = x and its velocity, both [batch, *event]."""
        return self.x_scale[k].item() * x + self.v_scale[k].item() * v

    @property
    def control_scale(self) -> Tensor:
        """[K] factors from a change of velocity to the control w_k; 0 where a step has no noise and cannot be controlled."""
        return torch.where(self.std > 0, self.v_scale / self.std, 0.0)

    @property
    def energy(self) -> Tensor:
        """[K]: a change of the velocities by dv_k costs sum_k energy_k E|dv_k|^2 / 2. This is the path KL between the two
        chains, unless the sampler sets another price."""
        return self.control_scale**2 if self.price is None else self.price

    def part(self, first: int, last: int) -> Chain:
        """The steps from `first` on, before `last`."""
        price = None if self.price is None else self.price[first:last]
        x_scale, v_scale, std = (each[first:last] for each in (self.x_scale, self.v_scale, self.std))
        return Chain(self.times[first : last + 1], x_scale, v_scale, std, price)

    def with_last_step_of(self, other: Chain) -> Chain:
        """This chain with the last step, and its price, of another one."""
        pairs = (
            (self.x_scale, other.x_scale),
            (self.v_scale, other.v_scale),
            (self.std, other.std),
            (self.energy, other.energy),
        )
        return Chain(self.times, *(torch.cat([ours[:-1], theirs[-1:]]) for ours, theirs in pairs))


def step(
    chain: Chain,
    k: int,
    x: Tensor,
    v: Tensor,
    generator: Noise,
    project: Callable[[Tensor], Tensor] = lambda noise: noise,
) -> Tensor:
    """x_{k+1} from x_k = x and its velocity.

    Args:
        project: makes of standard normal noise that of the model; see `tiltflow.flows.field.VelocityField.project`.
    """
    mean, std = chain.mean(k, x, v), chain.std[k].item()
    if std == 0:
        return mean
    return mean + std * project(normal(x.shape, generator, x.dtype))


def sde(times: Tensor, sigma: Callable[[Tensor], Tensor]) -> Chain:
    r"""Euler-Maruyama of dX = (v + sigma^2 / (2 eta) (v - kappa X)) dt + sigma dB (2409.08861, eq. 4).

    The marginals are those of the ODE for every sigma(t) [K] -> [K], finite on the grid without its last time.
    On the linear path the bracket is sigma^2 (t v - x) / (2 (1 - t)): finite at t = 0.
    """
    t, h = times[:-1], times.diff()
    variance = sigma(t) ** 2
    pull = variance / (2 * (1 - t))
    return Chain(times, 1 - h * pull, h * (1 + pull * t), (h * variance).sqrt())
