"""Policy gradients that compare the samples of a group: their gradients against the definition, and their laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from curved import Curved
from tiny import iterate
from torch import Tensor, nn
from torch.distributions import Normal
from torch.testing import assert_close

from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.laws.other_laws import per_step_variance, window_fraction
from tiltflow.laws.target import Target
from tiltflow.methods.ddpo import Ddpo
from tiltflow.methods.dpok import Dpok
from tiltflow.methods.flow_grpo import FlowGrpo
from tiltflow.methods.policies.policy_gradient import among_others
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.rollout import Trajectory
from tiltflow.settings import validate
from tiltflow.streams import stream
from tiltflow.training.optimizer import fill_optimizer

pytestmark = pytest.mark.usefixtures("double")

CPU = torch.device("cpu")
COUNT = 16


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


# ---- a price on the KL: DPOK and Flow-GRPO ----


def price(path: Trajectory, tuned: Flow) -> Tensor:
    """KL of the Gaussian steps from those of the base, [steps, batch], with a gradient."""
    rows = []
    for k in range(len(path.velocities)):
        x, t = path.states[k], path.chain.times[k]
        ours, theirs = (Normal(path.chain.mean(k, x, flow(x, t)), path.chain.std[k]) for flow in (tuned, BASE))
        rows.append(torch.distributions.kl_divergence(ours, theirs).sum(1))
    return torch.stack(rows)


def loss_of(method: Any, path: Trajectory, advantages: Tensor, tuned: Flow) -> Tensor:
    """The loss by its definition, at the policy that made the trajectories."""
    kl = price(path, tuned)
    costs = method.beta * kl.detach()
    later = costs.flip(0).cumsum(0).flip(0) - costs
    later = (later - later.mean(1, keepdim=True)) * COUNT / (COUNT - 1)
    a = advantages - (later if method.kl_gradient == "whole" else 0)
    return (-a * log_densities(path, tuned) / method.beta + kl).sum(0).mean()


@pytest.mark.parametrize("kl_gradient", ["per-step", "whole"])
@pytest.mark.parametrize(
    "method",
    [
        Dpok(beta=0.4, solver="memoryless", num_inference_steps=6),
        Dpok(beta=0.4, solver="flow-sde", num_inference_steps=6, form="score-function", num_passes=1),
        FlowGrpo(beta=0.4, num_inference_steps=6),
        FlowGrpo(beta=0.4, num_inference_steps=6, advantages="centered", eta=1.0),
    ],
    ids=["dpok", "dpok-score-function", "flow-grpo", "flow-grpo-centred"],
)
def test_the_gradient_of_a_priced_policy(method: Any, kl_gradient: str) -> None:
    method = method.model_copy(update={"kl_gradient": kl_gradient})
    tuned, values = tuned_at(-0.7, 0.2, 0.3)
    x = torch.randn(COUNT, 2, generator=stream(1))
    path, advantages = path_of(method, tuned, x)
    if getattr(method, "advantages", "centered") == "standardized":
        advantages = standardised(advantages)
    expected = gradient_of(loss_of(method, path, advantages, tuned), values)
    measured = next(iterate(method, tuned, BASE, reward, x, stream(0), None))
    assert_close(values.grad, expected, rtol=1e-7, atol=1e-9)
    assert measured["path_kl"] == pytest.approx(price(path, tuned).sum(0).mean().item())


class Slopes(nn.Module):
    """The velocity of N(0, 1), and a slope of one's own at each step of a grid."""

    def __init__(self, times: Tensor, slopes: Tensor | None = None) -> None:
        super().__init__()
        self.times = times
        self.slopes = None if slopes is None else nn.Parameter(slopes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.reshape(-1, 1)
        v = (2 * t - 1) / (t**2 + (1 - t) ** 2) * x
        if self.slopes is None:
            return v
        return v + self.slopes[(t[:, 0, None] - self.times[None]).abs().argmin(1)].reshape(-1, 1) * x


def best_slopes(chain: Chain, tilt: float, *, whole: bool) -> tuple[Tensor, float]:
    """Slopes of the velocity at which policy gradients of N(0, 1) under -x^2 / 2 settle, and the variance of the end: by
    dynamic programming, with the KL of later steps or without."""
    t = chain.times[:-1]
    gain = chain.x_scale + chain.v_scale * (2 * t - 1) / (t**2 + (1 - t) ** 2)
    slopes, P = torch.zeros(len(chain)), torch.tensor(tilt)
    closed = gain.clone()
    for k in reversed(range(len(chain))):
        s = chain.std[k]
        if s > 0:
            closed[k] = gain[k] / (1 + s**2 * P)
            slopes[k] = (closed[k] - gain[k]) / chain.v_scale[k]
        cost = ((closed[k] - gain[k]) / s) ** 2 if whole and s > 0 else 0
        P = P * closed[k] ** 2 + cost
    variance = torch.ones(())
    for k in range(len(chain)):
        variance = closed[k] ** 2 * variance + chain.std[k] ** 2
    return slopes, variance.item()


def test_the_law_of_a_price_per_step_is_milder_than_the_tilt() -> None:
    """Of N(0, 1) under -x^2 / 2 it is log(1 + 2 / beta) beta / 2; with the whole gradient it is the tilt."""
    chain = Dpok(solver="memoryless", num_inference_steps=1000).sampling.chain()
    assert per_step_variance(1.0) == pytest.approx(0.549306, abs=1e-6)
    for tilt in (0.25, 1.0, 4.0):
        assert best_slopes(chain, tilt, whole=False)[1] == pytest.approx(per_step_variance(tilt), rel=6e-3)
        assert best_slopes(chain, tilt, whole=True)[1] == pytest.approx(1 / (1 + tilt), rel=6e-3)


@pytest.mark.parametrize("kl_gradient", ["per-step", "whole"])
def test_where_a_priced_policy_settles(kl_gradient: Any) -> None:
    """At its own fixed point the gradients have mean 0, and at that of the other price they have not."""
    method = Dpok(beta=1.0, solver="memoryless", num_inference_steps=6, kl_gradient=kl_gradient)
    chain = method.sampling.chain()
    base = Flow(Slopes(chain.times))

    def z(whole: bool) -> Tensor:
        slopes = best_slopes(chain, 1.0, whole=whole)[0][:-1]
        found = []
        for seed in range(12):
            network = Slopes(chain.times[:-2], slopes.clone())
            x = torch.randn(6_000, 1, generator=stream(seed, "start"))
            next(iterate(method, Flow(network), base, lambda x: -(x[:, 0] ** 2) / 2, x, stream(seed), None))
            assert network.slopes is not None
            found.append(network.slopes.grad)
        each = torch.stack([g for g in found if g is not None])
        return (each.mean(0) / (each.std(0) / 12**0.5)).abs()

    own = kl_gradient == "whole"
    assert z(own).max() < 4.4  # t distribution, 11 degrees of freedom, 5 steps
    assert z(not own).max() > 7


@pytest.mark.parametrize(("window", "eta"), [((100, 300), 1.0), ((300, 500), 1.0), ((300, 500), 0.245**0.5)])
def test_a_window_of_noise_reaches_a_part_of_the_tilt(window: tuple[int, int], eta: float) -> None:
    """The best control of the method's own chain for a linear reward, in closed form; the whole tilt moves the mean by 1."""
    chain = FlowGrpo(num_inference_steps=1000, sde_window_range=window, eta=eta)._chain(0.0)
    t = chain.times[:-1]
    gain = chain.x_scale + chain.v_scale * (2 * t - 1) / (t**2 + (1 - t) ** 2)
    ahead = torch.cat([gain.flip(0).cumprod(0).flip(0)[1:], torch.ones(1)])
    reached = (chain.std * ahead).square().sum().item()
    assert reached == pytest.approx(window_fraction(1.0, window[0] / 1000, window[1] / 1000, eta**2), abs=3e-3)


def test_only_the_steps_of_a_window_are_learned() -> None:
    method = FlowGrpo(num_inference_steps=8, sde_window_size=2, beta=0.5)
    starts = {method._in_a_window(stream(seed)).sde_window_range for seed in range(40)}
    assert starts == {(0, 2), (1, 3), (2, 4)}
    inside = method._in_a_window(stream(0))
    assert inside.sde_window_range is not None
    first, end = inside.sde_window_range
    chain = inside._chain(0.0)
    assert (chain.std > 0).nonzero()[:, 0].tolist() == list(range(first, end))
    tuned, values = tuned_at(-0.7, 0.2, 0.3)
    x = torch.randn(COUNT, 2, generator=stream(1))
    path, advantages = path_of(inside, tuned, x)
    rows = [
        Normal(chain.mean(k, path.states[k], tuned(path.states[k], chain.times[k])), chain.std[k])
        .log_prob(path.states[k + 1])
        .sum(1)
        for k in range(first, end)
    ]
    kl = [
        (chain.energy[k] / 2 * (tuned(path.states[k], chain.times[k]) - BASE(path.states[k], chain.times[k])) ** 2).sum(1)
        for k in range(first, end)
    ]
    loss = (-standardised(advantages) * torch.stack(rows).sum(0) / 0.5 + torch.stack(kl).sum(0)).mean()
    next(iterate(inside, tuned, BASE, reward, x, stream(0), None))
    assert_close(values.grad, gradient_of(loss, values), rtol=1e-7, atol=1e-9)


def test_the_published_noise_of_flow_grpo() -> None:
    """In its own clock, noise at 1: x + [v + s^2 / 2t (x + (1 - t) v)] dt + s sqrt|dt| eps, s = 0.7 sqrt(t / (1 - t))."""
    chain = FlowGrpo(eta=0.7 / 2**0.5)._chain(0.0)
    x, data_velocity = 1.3, -0.4
    for k in (3, 7):
        t, h = 1 - chain.times[k].item(), (chain.times[k + 1] - chain.times[k]).item()
        s, v = 0.7 * math.sqrt(t / (1 - t)), -data_velocity
        mean = x + (v + s**2 / (2 * t) * (x + (1 - t) * v)) * -h
        assert chain.mean(k, torch.tensor(x), torch.tensor(data_velocity)).item() == pytest.approx(mean)
        assert chain.std[k].item() == pytest.approx(s * math.sqrt(h))


def test_which_laws_they_say_they_aim_at() -> None:
    def law(method: Any) -> Target:
        target: Target = method.target(100)
        return target

    exact = [Dpok(kl_gradient="whole"), FlowGrpo(kl_gradient="whole", eta=1.0, advantages="centered")]
    assert [law(method).reaches for method in exact] == ["exact", "exact"]
    assert [law(method).caveats for method in exact] == [(), ()]
    assert law(Dpok()).reaches == law(FlowGrpo(eta=1.0, advantages="centered")).reaches == "first-order"
    assert "pays for its own KL alone" in law(Dpok()).caveats[0]
    published = law(FlowGrpo())
    assert published.reaches == "none"
    assert any("standard deviation" in caveat for caveat in published.caveats)
    assert any("not memoryless" in caveat for caveat in published.caveats)
    window = law(FlowGrpo(eta=1.0, advantages="centered", sde_window_range=(2, 4)))
    assert window.reaches == "none"
    assert "The first 2 steps have no noise" in window.caveats[0]
    assert (FlowGrpo().temperature, FlowGrpo(advantages="centered", beta=0.3).temperature) == (None, 0.3)
    with pytest.raises(InputError, match="no temperature with standardized advantages"):
        FlowGrpo().at_temperature(0.1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sde_window_range": [3, 20]}, r"within 0 and num_inference_steps \(10\)"),
        ({"sde_window_size": 6}, "at most 5"),
        ({"sde_window_size": 2, "train_timesteps": [{"count": 1}]}, "leave one of the two out"),
        ({"advantages": "normalised"}, "'standardized' or 'centered'"),
    ],
)
def test_windows_that_do_not_fit(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        validate(FlowGrpo, settings, "method")
