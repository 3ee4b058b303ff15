r"""Samplers, as the Markov chains that they are.

Every sampler here that evaluates the network once a step is a chain of Gaussian steps on the linear path,

    x_{k+1} = x_scale_k x_k + v_scale_k v(x_k, t_k) + std_k eps_k,      k = 0 .. K - 1,  t_0 ~ 0 < .. < t_K = 1,

so a sampler is three numbers a step. With the same three numbers, a change of velocity v -> v + dv is the control
w_k = v_scale_k dv / std_k, the KL divergence between two chains is sum_k E|w_k|^2 / 2, exactly, and the adjoint of a
step is x_scale_k a + v_scale_k J_v^T a. No method needs to know which sampler it runs on.

Which sampler when (variance of the result over the true one, exact velocity, data N(0.7, 0.25), 10 / 20 / 40 steps):

    euler               0.742  0.862  0.929   the ODE: no noise, nothing to tune against; good for sampling
    memoryless          1.018  1.004  1.001   without the noiseless last step; 1.028 / 1.005 / 1.001 with it: the default
    memoryless_offset   1.326  1.178  1.093   as printed in 2409.08861: its drift fits another noise level than its noise
    ddim(eta=1)         0.597  0.750  0.856   DDPM's posterior steps: memoryless, biased to small variance
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.flow import Flow, VelocityField
from tiltflow.settings import Settings


@dataclass(frozen=True)
class Chain:
    """A sampler on a time grid. `times` is [K + 1], the rest [K], all float64 on the CPU."""

    times: Tensor
    x_scale: Tensor
    v_scale: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.std)

    def mean(self, k: int, x: Tensor, v: Tensor) -> Tensor:
        """The mean of x_{k+1} given x_k = x and its velocity, both [batch, *event]."""
        return self.x_scale[k].item() * x + self.v_scale[k].item() * v

    @property
    def control_scale(self) -> Tensor:
        """[K]: what turns a change of velocity into the control w_k; 0 where a step has no noise and cannot be controlled."""
        return torch.where(self.std > 0, self.v_scale / self.std, 0.0)


@dataclass(frozen=True)
class Trajectory:
    """One simulated batch: the states x_0, x_1, .. and the velocities that took each step, all [batch, *event]."""

    chain: Chain
    states: list[Tensor]
    velocities: list[Tensor]


def time_grid(num_inference_steps: int, *, start: float = 0.0, shift: float = 1.0) -> Tensor:
    """K + 1 times from `start` to 1, float64. shift > 1 spends more steps near the noise, as in diffusers' flow schedulers:
    1 - t goes to shift (1 - t) / (1 + (shift - 1) (1 - t))."""
    noise = 1 - torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float64)
    noise = shift * noise / (1 + (shift - 1) * noise)
    return start + (1 - start) * (1 - noise)


def euler(times: Tensor) -> Chain:
    """The probability-flow ODE by Euler's method, order 1; on a diffusion model it is deterministic DDIM (2010.02502)."""
    h = times.diff()
    return Chain(times, torch.ones_like(h), h, torch.zeros_like(h))


def sde(times: Tensor, sigma: Callable[[Tensor], Tensor]) -> Chain:
    r"""Euler-Maruyama of dX = (v + sigma^2 / (2 eta) (v - kappa X)) dt + sigma dB (2409.08861, eq. 4).

    The marginals are those of the ODE for every sigma(t) [K] -> [K], finite on the grid without its last time.
    On the linear path the bracket is sigma^2 (t v - x) / (2 (1 - t)): finite at t = 0.
    """
    t, h = times[:-1], times.diff()
    variance = sigma(t) ** 2
    pull = variance / (2 * (1 - t))
    return Chain(times, 1 - h * pull, h * (1 + pull * t), (h * variance).sqrt())


def memoryless_sigma(t: Tensor) -> Tensor:
    """sqrt(2 eta) = sqrt(2 (1 - t) / t) on the linear path; infinite at t = 0."""
    return (2 * (1 - t) / t).sqrt()


def memoryless(times: Tensor, *, denoise: bool = True) -> Chain:
    r"""Memoryless first jump, then Euler-Maruyama with exact kappa and sigma^2 = 2 eta.

    The first step draws x_{t_1} = t_1 x1hat(x_0) + (1 - t_1) eps afresh: for an exact model x1hat does not depend on pure
    noise, so the chain forgets x_0 exactly, nothing is infinite, and there is no offset to tune. With `denoise` the last
    step follows the ODE without noise (its std would be h sqrt(2 / (1 - h))); it is not controlled.
    """
    after_jump = sde(times[1:], memoryless_sigma)
    t, s = times[0], times[1]
    chain = Chain(
        times,
        torch.cat([s[None], after_jump.x_scale]),
        torch.cat([(s * (1 - t))[None], after_jump.v_scale]),
        torch.cat([(1 - s)[None], after_jump.std]),
    )
    return _replace_last(chain, euler(times)) if denoise else chain


def memoryless_offset(times: Tensor) -> Chain:
    """The scheme of 2409.08861, appendix G, on a uniform grid of step h: drift 2 v - x / (t + h) and
    sigma^2 = 2 (1 - t + h) / (t + h). The drift preserves the marginals for sigma^2 = 2 eta only: biased at order h."""
    t, h = times[:-1], times.diff()
    return Chain(times, 1 - h / (t + h), 2 * h, (h * 2 * (1 - t + h) / (t + h)).sqrt())


def ddim(times: Tensor, eta: float = 0.0) -> Chain:
    r"""DDIM(eta) steps (2010.02502, eq. 12 and 16); eta = 1 is DDPM's posterior sampling, memoryless; eta = 0 is `euler`.

    x' = alpha' x1hat + sqrt(beta'^2 - std^2) x0hat + std eps with std = eta beta' sqrt(1 - r^2), r = alpha beta' / alpha' beta.
    Free of the scale of x, hence the same on the linear path. The step to t = 1 has no noise.
    """
    t, s = times[:-1], times[1:]
    ratio = (t * (1 - s)) / (s * (1 - t))
    std = eta * (1 - s) * (1 - ratio**2).clamp(min=0).sqrt()
    rest = ((1 - s) ** 2 - std**2).clamp(min=0).sqrt()
    return Chain(times, s + rest, s * (1 - t) - rest * t, std)


def _replace_last(chain: Chain, other: Chain) -> Chain:
    def last(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.cat([ours[:-1], theirs[-1:]])

    return Chain(
        chain.times, last(chain.x_scale, other.x_scale), last(chain.v_scale, other.v_scale), last(chain.std, other.std)
    )


def rollout(chain: Chain, flow: VelocityField, x: Tensor, generator: torch.Generator) -> Trajectory:
    """Simulate the chain from x [batch, *event], keeping every state and velocity.

    A last step without noise is left out: it cannot be controlled, so in training it belongs to the base, and the adjoint,
    which evaluates the base there anyway, takes it.
    """
    states, velocities = [x], []
    for k in range(len(chain) - int(chain.std[-1] == 0)):
        v = flow(x, chain.times[k])
        x = step(chain, k, x, v, generator)
        states.append(x)
        velocities.append(v)
    return Trajectory(chain, states, velocities)


def step(chain: Chain, k: int, x: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """x_{k+1} from x_k = x and its velocity."""
    mean, std = chain.mean(k, x, v), chain.std[k].item()
    if std == 0:
        return mean
    return mean + std * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def heun(times: Tensor, flow: VelocityField, x: Tensor) -> Tensor:
    """The probability-flow ODE by Heun's method, order 2, two evaluations a step but one in the last, whose end is singular
    for some predictions. Returns x at the last time."""
    for k in range(len(times) - 1):
        t, s = times[k], times[k + 1]
        h = (s - t).item()
        v = flow(x, t)
        end = x + h * v
        x = end if k == len(times) - 2 else x + h / 2 * (v + flow(end, s))
    return x


Solver = Literal["memoryless", "memoryless-offset", "ddpm", "ddim", "euler", "heun"]


class Sampling(Settings):
    """How to sample: which solver, on which grid."""

    solver: Solver = "memoryless"
    num_inference_steps: Annotated[int, Field(ge=1)] = 40
    shift: Annotated[float, Field(gt=0)] = 1.0
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The noise of the `ddim` solver: 0 is deterministic, 1 is DDPM."""

    def times(self, start: float = 0.0) -> Tensor:
        return time_grid(self.num_inference_steps, start=start, shift=self.shift)

    def chain(self, start: float = 0.0) -> Chain:
        """The chain of this solver from time `start`. Raises ValueError for heun, which is not one."""
        times = self.times(start)
        match self.solver:
            case "memoryless":
                return memoryless(times)
            case "memoryless-offset":
                return memoryless_offset(times)
            case "ddpm":
                return ddim(times, eta=1.0)
            case "ddim":
                return ddim(times, eta=self.eta)
            case "euler":
                return euler(times)
            case "heun":
                raise ValueError("heun evaluates the network twice a step: it is no chain of Gaussian steps")


def noise(flow: Flow, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Starting points [batch, *event] on the linear path: standard normal in the coordinates of the flow's interpolant."""
    draw = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    c = flow.interpolant(torch.zeros((), dtype=torch.float64))
    return draw / (c.alpha + c.beta).item()


@torch.no_grad()
def sample(flow: VelocityField, x: Tensor, sampling: Sampling, generator: torch.Generator, *, start: float = 0.0) -> Tensor:
    """Samples [batch, *event] at t = 1 from starting points x at time `start`."""
    if sampling.solver == "heun":
        return heun(sampling.times(start), flow, x)
    chain = sampling.chain(start)
    for k in range(len(chain)):
        x = step(chain, k, x, flow(x, chain.times[k]), generator)
    return x
