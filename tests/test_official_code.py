"""The preset `official-code` of Adjoint Matching against the formulas of its authors' code, in that code's own coordinates."""

from __future__ import annotations

import pytest
import torch
from tiny import iterate
from torch import Tensor, nn
from torch.testing import assert_close

from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import DiscreteVariancePreserving
from tiltflow.methods.adjoint_matching import AdjointMatching, State
from tiltflow.samplers.rollout import rollout
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")

PATH = DiscreteVariancePreserving(beta_start=0.002, beta_end=0.009, beta_schedule="scaled_linear")
REWARD_MULTIPLIER = 2.5


def timesteps(steps: int) -> list[int]:
    """`trailing`: 999, 979, .., 19 in 50 steps."""
    return [1000 - 1 - k * 1000 // steps for k in range(steps)]


def alphas_cumprod(steps: int) -> Tensor:
    """[steps + 1]: of the timesteps, and the last one half way to 1."""
    found = (1 - torch.linspace(0.002**0.5, 0.009**0.5, 1000) ** 2).cumprod(0)[timesteps(steps)]
    return torch.cat([found, (1 + found[-1:]) / 2])


def grid(steps: int) -> Tensor:
    """On the linear path, to data, as the grid of a pipeline in training."""
    a, b = alphas_cumprod(steps)[:-1].sqrt(), (1 - alphas_cumprod(steps)[:-1]).sqrt()
    return torch.cat([a / (a + b), torch.ones(1)])


class Epsilon(nn.Module):
    def __init__(self, weight: list[list[float]]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return 0.6 * x + torch.tanh(x @ self.weight + timestep[:, None] / 1000)


def reward(x: Tensor) -> Tensor:
    return torch.sin(2 * x[:, 0]) - x[:, 1] ** 4 / 4 + x[:, 0] * x[:, 1]


def mean_and_std(x: Tensor, eps: Tensor, k: int, steps: int, eta: float) -> tuple[Tensor, Tensor]:
    """A step of DDIM from timestep k."""
    here, there = alphas_cumprod(steps)[k : k + 2]
    std = eta * ((1 - there) / (1 - here) * (1 - here / there)).sqrt()
    x1 = (x - (1 - here).sqrt() * eps) / here.sqrt()
    return there.sqrt() * x1 + (1 - there - std**2).sqrt() * eps, std


def test_the_schedule_has_the_numbers_of_stable_diffusion() -> None:
    """Noise left at the end, the noise of the last step, and the change of the control of steps by that of epsilon."""
    ab = alphas_cumprod(50)
    assert_close(ab[[0, 49, 50]], torch.tensor([0.00612, 0.95992, 0.97996]), atol=6e-6, rtol=0)
    chain = AdjointMatching(preset="official-code").chain(grid)
    assert len(chain) == 50
    assert_close(chain.std[-1], torch.tensor(0.1011), atol=5e-5, rtol=0)
    norm = torch.hypot(chain.times, 1 - chain.times)
    assert_close((chain.std / norm[1:])[[0, 25]], torch.tensor([0.4046, 0.2994]), atol=5e-5, rtol=0)
    per_epsilon = chain.control_scale / chain.times[:-1]  # v = (x - eps) / t
    expected = torch.tensor([0.4444, 0.3990, 0.3571, 0.4137, 1.0438, 1.0207])
    assert_close(per_epsilon[[0, 10, 25, 40, 48, 49]], expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_are_those_of_its_scheduler(eta: float) -> None:
    """At eta 0 too, where the table has half of its rows."""
    network, steps = Epsilon([[0.3, -0.2], [0.1, 0.4]]).requires_grad_(False), 8
    chain = Sampling(solver="ddim-half-way", eta=eta, num_inference_steps=steps).chain(grid)
    x = torch.randn(5, 2, generator=stream(0))
    norm = torch.hypot(chain.times, 1 - chain.times)
    path = rollout(chain, Flow(network, "epsilon", PATH), x * norm[0], stream(1), to_the_end=True)
    noise = [path.noise(k) if eta else torch.zeros(5, 2) for k in range(steps)]
    for k, t in enumerate(timesteps(steps)):
        mean, std = mean_and_std(x, network(x, torch.full((5,), float(t))), k, steps, eta)
        x = mean + std * noise[k]
        assert_close(path.states[k + 1], x * norm[k + 1])


def test_the_gradient_is_that_of_the_code() -> None:
    """Its loss is the mean over the steps too, of which ours is the sum."""
    steps, batch = 8, 6
    base, tuned = Epsilon([[0.3, -0.2], [0.1, 0.4]]).requires_grad_(False), Epsilon([[0.5, -0.3], [0.0, 0.2]])
    every = {"num_inference_steps": steps, "train_timesteps": None, "drop_quantile": None}
    method = AdjointMatching(preset="official-code", beta=1 / REWARD_MULTIPLIER, **every)
    chain, x = method.chain(grid), torch.randn(batch, 2, generator=stream(0))
    norm, fields = torch.hypot(chain.times, 1 - chain.times), [Flow(network, "epsilon", PATH) for network in (tuned, base)]
    (measured,) = iterate(method, fields[0], fields[1], reward, x * norm[0], stream(1), State(), start=grid)

    with torch.no_grad():
        path = rollout(chain, fields[0], x * norm[0], stream(1))
        noise = [path.noise(k) for k in range(steps)]
    assert len(path.velocities) == steps  # the last step has noise and is controlled
    states = [x]
    for k, t in enumerate(timesteps(steps)):
        with torch.no_grad():
            mean, std = mean_and_std(states[-1], tuned(states[-1], torch.full((batch,), float(t))), k, steps, 1.0)
        states.append(mean + std * noise[k])
    end = states[-1].requires_grad_()
    (gradient,) = torch.autograd.grad(reward(end).sum(), end)
    a, terms = -REWARD_MULTIPLIER * gradient, []
    for k in range(steps - 1, -1, -1):
        x, time = states[k].detach().requires_grad_(), torch.full((batch,), float(timesteps(steps)[k]))
        mean, std = mean_and_std(x, base(x, time), k, steps, 1.0)
        (pulled,) = torch.autograd.grad(((mean - x) * a).sum(), x)
        a = a + pulled
        control = (mean_and_std(x.detach(), tuned(x.detach(), time), k, steps, 1.0)[0] - mean.detach()) / std
        terms.append((control + std * a).square().sum(1))
    loss = torch.stack(terms).mean()
    assert measured["loss"] == pytest.approx(steps * loss.item())
    assert measured["reward"] == pytest.approx(reward(end).mean().item())
    (expected,) = torch.autograd.grad(loss, tuned.weight)
    assert_close(tuned.weight.grad, steps * expected)
