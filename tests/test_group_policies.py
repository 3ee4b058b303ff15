"""Policy gradients that compare the samples of a group: their gradients against the definition, and their laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import iterate
from torch import Tensor, nn
from torch.distributions import Normal
from torch.testing import assert_close

from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.methods.ddpo import Ddpo
from tiltflow.methods.policies.policy_gradient import among_others
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.samplers.rollout import Trajectory
from tiltflow.settings import validate
from tiltflow.streams import stream
from tiltflow.training.optimizer import fill_optimizer

pytestmark = pytest.mark.usefixtures("double")

CPU = torch.device("cpu")
COUNT = 16


class Curved(nn.Module):
    """A velocity with three parameters, in two dimensions."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a, b, c = self.values
        return a * x + b * t.reshape(-1, 1) * x.flip(1) + c * torch.tanh(x)


BASE = Flow(Curved(-0.8, 0.1, 0.2))


def reward(x: Tensor) -> Tensor:
    return x[:, 0] - x[:, 1] ** 2 + torch.where(x[:, 0] > 1, 3.0, 0.0)


def tuned_at(*values: float) -> tuple[Flow, nn.Parameter]:
    network = Curved(*values)
    return Flow(network), network.values


def path_of(method: Any, tuned: Flow, x: Tensor) -> tuple[Trajectory, Tensor]:
    """The trajectories that the method draws itself, and the advantages of their ends."""
    with torch.no_grad():
        path, end = method.rollout(tuned, BASE, x, stream(0))
    r = reward(end)
    return path, (r - r.mean()) * len(r) / (len(r) - 1)


def log_densities(path: Trajectory, tuned: Flow) -> Tensor:
    """log p of the steps that were taken, [steps, batch], with a gradient in the weights of `tuned`."""
    rows = []
    for k in range(len(path.velocities)):
        mean = path.chain.mean(k, path.states[k], tuned(path.states[k], path.chain.times[k]))
        rows.append(Normal(mean, path.chain.std[k]).log_prob(path.states[k + 1]).sum(1))
    return torch.stack(rows)


def gradient_of(loss: Tensor, parameter: nn.Parameter) -> Tensor:
    return torch.autograd.grad(loss, parameter)[0]


def standardised(advantages: Tensor) -> Tensor:
    spread = (advantages * (len(advantages) - 1) / len(advantages)).square().mean().sqrt()
    return (advantages / (spread + 1e-8)).clamp(-5, 5)


# ---- DDPO ----


@pytest.mark.parametrize("solver", ["ddpm", "memoryless"])
@pytest.mark.parametrize("form", ["score-function", "importance-sampling"])
def test_ddpo_is_reinforce_before_the_first_update(form: Any, solver: str) -> None:
    """The gradient of - sum_k A log p_k, of either form."""
    method = Ddpo(form=form, solver=solver, num_inference_steps=6)
    tuned, values = tuned_at(-0.7, 0.2, 0.3)
    x = torch.randn(COUNT, 2, generator=stream(1))
    path, advantages = path_of(method, tuned, x)
    expected = gradient_of(-(standardised(advantages) * log_densities(path, tuned)).sum(0).mean(), values)
    measured = next(iterate(method, tuned, BASE, reward, x, stream(0), None))
    assert_close(values.grad, expected, rtol=1e-9, atol=1e-10)
    assert measured["step_kl"] == pytest.approx(0, abs=1e-20)


def test_ddpo_clips_the_ratio_after_an_update() -> None:
    """min(rho A, clip(rho) A), some of it clipped."""
    method = Ddpo(num_inference_steps=6, num_passes=2, clip_range=0.05)
    tuned, values = tuned_at(-0.7, 0.2, 0.3)
    x = torch.randn(COUNT, 2, generator=stream(1))
    path, advantages = path_of(method, tuned, x)
    before, a = log_densities(path, tuned).detach(), standardised(advantages)
    updates = iterate(method, tuned, BASE, reward, x, stream(0), None)
    next(updates)
    with torch.no_grad():
        values += torch.tensor([0.06, -0.05, 0.04])
    values.grad = None
    measured = next(updates)
    ratio = (log_densities(path, tuned) - before).exp()
    kept = torch.where(a > 0, ratio < 1.05, ratio > 0.95)
    assert 0.2 < kept.double().mean() < 0.9  # both occur
    loss = -torch.where(kept, ratio * a, torch.where(a > 0, 1.05, 0.95) * a).sum(0).mean()
    assert_close(values.grad, gradient_of(loss, values), rtol=1e-9, atol=1e-10)
    assert measured["loss"] == pytest.approx(loss.item())
    assert measured["step_kl"] > 0


def test_the_preset_of_score_as_action_is_ddpo() -> None:
    """Recipes from before it had a name: the same numbers, to the last bit, and the same optimizer."""
    found = []
    for method in (ScoreAsAction(preset="ddpo", num_inference_steps=5), Ddpo(num_inference_steps=5, num_passes=2)):
        tuned, values = tuned_at(-0.7, 0.2, 0.3)
        x = torch.randn(COUNT, 2, generator=stream(1))
        losses = []
        for measured in iterate(method, tuned, BASE, reward, x, stream(0), method.new_state((2,), 0, CPU)):
            losses.append(measured["loss"])
            with torch.no_grad():
                values += 0.01
        found.append((losses, values.grad))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    old, new = (fill_optimizer(method) for method in (ScoreAsAction(preset="ddpo"), Ddpo()))
    assert old == new
    assert new.learning_rate == 3e-4


def test_ddpo_has_no_law() -> None:
    target = Ddpo(beta=0.3).target(100)
    assert (target.reaches, Ddpo().temperature) == ("none", None)
    assert "Nothing but the size of the steps" in target.caveats[0]
    with pytest.raises(InputError, match="no temperature"):
        Ddpo().at_temperature(0.5)


def test_a_constant_reward_has_no_gradient() -> None:
    tuned, values = tuned_at(-0.7, 0.2, 0.3)
    next(iterate(Ddpo(num_inference_steps=5), tuned, BASE, lambda x: 0 * x[:, 0], torch.randn(COUNT, 2), stream(0), None))
    assert values.grad is not None
    assert values.grad.abs().max() == 0


def test_advantages_are_of_groups() -> None:
    values, members = torch.tensor([1.0, 3.0, 10.0, 20.0, 60.0]), [torch.tensor([0, 1]), torch.tensor([2, 3, 4])]
    found = among_others(values, members, standardize=False)
    assert found.tolist() == pytest.approx([-2, 2, 10 - 40, 20 - 35, 60 - 15])
    found = among_others(values, members, standardize=True)
    assert found[:2].tolist() == pytest.approx([-2, 2])
    assert found[4].item() == pytest.approx(30 * 1.5 / math.sqrt((20**2 + 10**2 + 30**2) / 3))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"solver": "heun"}, "solver 'heun' has no steps with noise and a density"),
        ({"solver": "stochastic-heun"}, "solver 'stochastic-heun' has no steps with noise and a density"),
        ({"form": "score-function", "num_passes": 2}, "right before the first update alone"),
        ({"form": "ppo"}, "form"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        validate(Ddpo, settings, "method")


class Noisy(nn.Module):
    """Another velocity at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * torch.dropout(x, 0.5, train=True)


@pytest.mark.parametrize("form", ["score-function", "importance-sampling"])
def test_a_network_that_trains_differently_is_an_error(form: Any) -> None:
    method = Ddpo(form=form, num_inference_steps=4)
    with pytest.raises(InputError, match="before the first update"):
        next(iterate(method, Flow(Noisy()), BASE, reward, torch.randn(8, 2), stream(0), None))


def test_a_single_sample_teaches_nothing() -> None:
    assert "a single one is always 0" in str(Ddpo().learns_nothing(1))
    assert Ddpo().learns_nothing(2) is None
