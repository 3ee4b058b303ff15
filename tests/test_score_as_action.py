"""Score as Action: its gradients against the exact ones of the LQG problem, its costs against Girsanov, its run-time checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tiny import iterate
from torch import Tensor, nn
from torch.testing import assert_close

from tiltflow.control.value import FORMS, Critic, Value
from tiltflow.errors import InputError, NonFiniteError, SettingsError
from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import CorrectedVelocity, ExactVelocity, GaussianMixture
from tiltflow.laws.lqg import Lqg, evaluate_chain, evaluate_policy
from tiltflow.laws.lqg_fields import LinearPolicy, OnePolicyEach, base_flow, draw_start, interpolant, own_scale, reward_of
from tiltflow.methods.policies.policy_gradient import log_ratio
from tiltflow.methods.score_as_action import ScoreAsAction, State
from tiltflow.problems.mixture import Mixture
from tiltflow.problems.two_modes import TwoModes
from tiltflow.problems.verification.policy_gradients import ESTIMATORS, gradient_samples
from tiltflow.samplers.rollout import rollout
from tiltflow.streams import stream
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.trainer import Record, train

pytestmark = pytest.mark.usefixtures("double")

PROBLEM, BETA, TRAJECTORIES = Lqg(), 0.5, 40_000
UNBIASED = tuple(name for name in ESTIMATORS if name != "closed-form")


def on_lqg(estimator: str, steps: int, **settings: Any) -> ScoreAsAction:
    return ScoreAsAction.model_validate(
        {"estimator": estimator, "solver": "euler-maruyama", "num_inference_steps": steps, "beta": BETA} | settings
    )


def exact_gradient(problem: Lqg, steps: int) -> tuple[float, float]:
    return evaluate_chain(problem, BETA, np.full(steps, problem.K), np.full(steps, problem.k)).gradient


def z_scores(samples: Tensor, exact: Any) -> Tensor:
    return (samples.mean(1) - torch.tensor(exact)) / (samples.std(1) / samples.shape[1] ** 0.5)


def closed_form_mean(problem: Lqg, steps: int) -> tuple[float, float]:
    """What grad V(t_k, x_k) gives instead of the chain's gradient, exactly: V before the step instead of after it. On the
    linear path the gradient is in units of x_k / (alpha_k + beta_k) and the step in those of x_{k+1}."""
    chain = evaluate_chain(problem, BETA, np.full(steps, problem.K), np.full(steps, problem.k))
    scale = own_scale(on_lqg("closed-form", steps).sampling.times(base_flow(problem).noise_time))
    (mean, variance), D, dK, dk = problem.start(), problem.T / steps, 0.0, 0.0
    for n in range(steps):
        P, p, _ = chain.value(n)
        (F, h), square, ratio = problem.drift(n * D), mean**2 + variance, (scale[n] / scale[n + 1]).item()
        dK += D * (ratio * (-P * square + p * mean) - BETA * (problem.K * square + problem.k * mean))
        dk += D * (ratio * (-P * mean + p) - BETA * (problem.K * mean + problem.k))
        A, B = 1 + (F + problem.K) * D, (h + problem.k) * D
        mean, variance = A * mean + B, A**2 * variance + D
    return dK, dk


# ---- the four gradients ----


@pytest.mark.parametrize("steps", [5, 10, 40])
@pytest.mark.parametrize("estimator", UNBIASED)
def test_unbiased_gradients(estimator: str, steps: int) -> None:
    samples = gradient_samples(PROBLEM, on_lqg(estimator, steps), TRAJECTORIES, 0)
    assert z_scores(samples, exact_gradient(PROBLEM, steps)).abs().max() < 3


@pytest.mark.slow
@pytest.mark.parametrize("estimator", UNBIASED)
def test_unbiased_gradients_of_many_steps(estimator: str) -> None:
    samples = gradient_samples(PROBLEM, on_lqg(estimator, 160), TRAJECTORIES, 0)
    assert z_scores(samples, exact_gradient(PROBLEM, 160)).abs().max() < 3


@pytest.mark.parametrize("estimator", UNBIASED)
@pytest.mark.parametrize("problem", [Lqg(mean=0.4, variance=0.6, T=1.3, eta=0.6), Lqg(dimension=3, K=-0.4, k=0.5)])
def test_unbiased_gradients_of_other_problems(problem: Lqg, estimator: str) -> None:
    samples = gradient_samples(problem, on_lqg(estimator, 6, eta=problem.eta), TRAJECTORIES, 1)
    assert z_scores(samples, exact_gradient(problem, 6)).abs().max() < 3.3


@pytest.mark.parametrize("steps", [5, 20])
def test_the_closed_form_has_its_own_exact_mean(steps: int) -> None:
    samples = gradient_samples(PROBLEM, on_lqg("closed-form", steps), TRAJECTORIES, 0)
    assert z_scores(samples, closed_form_mean(PROBLEM, steps)).abs().max() < 3


def test_the_bias_of_the_closed_form_falls_like_one_over_the_steps() -> None:
    """Twice the steps, half the bias; of dK the part of order 1 / N is so small that one of N^(-3/2), a factor of 2.8, still
    shows: on the linear path a diffusion's coordinates move like the root of the time that is left."""
    biases = [
        [ours - exact for ours, exact in zip(closed_form_mean(PROBLEM, n), exact_gradient(PROBLEM, n), strict=True)]
        for n in (500, 1000, 2000, 4000)
    ]
    for (dK, dk), (half_dK, half_dk) in pairwise(biases):
        assert dk / half_dk == pytest.approx(2, rel=0.1)
        assert 2 < dK / half_dK < 2**1.5


@pytest.mark.slow
def test_variances_are_as_known() -> None:
    """Standard deviations of one trajectory at 160 steps, to 5 %, and the factor of five over mean-baselined REINFORCE."""
    known = {
        "return": (8.80, 4.53),
        "return-minus-value": (5.62, 3.49),
        "temporal-difference": (3.18, 1.81),
        "closed-form": (3.12, 1.78),
    }
    variances = {}
    for estimator, deviations in known.items():
        variances[estimator] = gradient_samples(PROBLEM, on_lqg(estimator, 160), TRAJECTORIES, 0).var(1)
        assert variances[estimator].sqrt().tolist() == pytest.approx(deviations, rel=0.05)
    for better in ("temporal-difference", "closed-form"):
        assert (variances["return"] / variances[better]).min() > 5


def test_variances_at_ten_steps() -> None:
    known = {
        "return": (9.40, 4.72),
        "return-minus-value": (5.70, 3.70),
        "temporal-difference": (3.86, 2.19),
    }
    for estimator, deviations in known.items():
        samples = gradient_samples(PROBLEM, on_lqg(estimator, 10), TRAJECTORIES, 0)
        assert samples.std(1).tolist() == pytest.approx(deviations, rel=0.06)


@pytest.mark.parametrize("estimator", ["return", "return-minus-value"])
def test_a_wrong_critic_leaves_the_first_two_unbiased(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltflow.laws.lqg_fields.QuadraticValue.forward", lambda self, x, t: 3 * x[:, :1] + 1)
    samples = gradient_samples(PROBLEM, on_lqg(estimator, 5), TRAJECTORIES, 0)
    assert z_scores(samples, exact_gradient(PROBLEM, 5)).abs().max() < 3


@pytest.mark.parametrize("estimator", ["temporal-difference", "closed-form"])
def test_a_wrong_critic_biases_the_last_two(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltflow.laws.lqg_fields.QuadraticValue.forward", lambda self, x, t: 3 * x[:, :1] + 1)
    samples = gradient_samples(PROBLEM, on_lqg(estimator, 5), TRAJECTORIES, 0)
    assert z_scores(samples, exact_gradient(PROBLEM, 5)).abs().max() > 20


class GroundReward(nn.Module):
    """The value function of an ODE that leaves every point where it is: the reward."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        own = x * own_scale(time)[:, None]
        return (PROBLEM.q * own - PROBLEM.Q * own.square() / 2).sum(1, keepdim=True)


@pytest.mark.parametrize(
    "solver",
    ["euler", "dpm-solver++", *(pytest.param(other, marks=pytest.mark.slow) for other in ("heun", "test_sampler:midpoint"))],
)
def test_gradient_of_the_ode(solver: str) -> None:
    """At the base, N(0, 1) data: dX = u / 2 dtau from X_0 ~ N(0, 1), so dJ = E int (X u / 2) grad r: (-Q T / 2, q T / 2)."""
    problem, errors = Lqg(K=0, k=0), []
    for steps in (40, 80):
        method = ScoreAsAction(solver=solver, num_inference_steps=steps, beta=BETA, num_passes=1, critic=Critic(num_steps=0))
        assert method.estimator == "closed-form"
        base = base_flow(problem)
        tuned = Flow(OnePolicyEach(problem, TRAJECTORIES), "epsilon", interpolant(problem))
        value = Value(GroundReward(), FORMS["reward-free"])
        value.fitted = True
        x = draw_start(problem, TRAJECTORIES, base.noise_time, stream(0, "start"))
        x = (x - x.mean()) / x.std() * math.sqrt(1) / own_scale(torch.tensor(base.noise_time))  # moments without error
        state = State(value, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0))
        next(
            iterate(
                method,
                tuned,
                base,
                reward_of(problem),
                x,
                stream(0),
                state,
                start=base.noise_time,
                micro_batch_size=TRAJECTORIES,
            )
        )
        (coefficients,) = tuned.parameters()
        gradient = -coefficients.grad.sum(1) * BETA  # type: ignore[union-attr]
        errors.append((gradient - torch.tensor([-PROBLEM.Q * PROBLEM.T / 2, PROBLEM.q * PROBLEM.T / 2])).abs().max().item())
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)  # the sum over the steps has order 1


# ---- costs ----


def one_iteration(
    method: ScoreAsAction, policy: tuple[float, float] = (0.2, -0.1), count: int = 20_000, passes: int = 1
) -> tuple[dict[str, float], Flow]:
    problem = Lqg(K=policy[0], k=policy[1])
    base, network = base_flow(problem), LinearPolicy(problem, 0)
    with torch.no_grad():
        network.coefficients.copy_(torch.tensor(policy)[:, None])
    tuned, start = Flow(network, "epsilon", interpolant(problem)), base.noise_time
    x = draw_start(problem, count, start, stream(0, "start"))
    updates = iterate(method, tuned, base, reward_of(problem), x, stream(0), method.new_state((1,), 0, x.device), start=start)
    return [next(updates) for _ in range(passes)][-1], tuned


def test_reward_path_kl_and_objective_are_those_of_the_chain() -> None:
    measured, _ = one_iteration(on_lqg("return", 12))
    exact = evaluate_chain(PROBLEM, BETA, np.full(12, 0.2), np.full(12, -0.1))
    assert measured["path_kl"] == pytest.approx(exact.path_kl, rel=0.03)
    assert measured["objective"] == pytest.approx(exact.objective, abs=4 * 1.3 / 20_000**0.5)
    assert measured["reward"] == pytest.approx(measured["objective"] + BETA * measured["path_kl"])


def test_path_kl_is_minus_the_log_likelihood_ratio(generator: torch.Generator) -> None:
    """Girsanov, discretely: E log(p_tuned(path) / p_base(path)) under the tuned chain, from the Gaussian densities."""
    base = base_flow(PROBLEM)
    network = LinearPolicy(PROBLEM, 0)
    with torch.no_grad():
        network.coefficients.copy_(torch.tensor([[0.5], [-0.4]]))
    tuned, start = Flow(network, "epsilon", interpolant(PROBLEM)), base.noise_time
    chain = on_lqg("return", 8).sampling.chain(start)
    with torch.no_grad():
        path = rollout(chain, tuned, draw_start(PROBLEM, 50_000, start, generator), generator)
        ratio, cost = torch.zeros(50_000), torch.zeros(50_000)
        for k in range(8):
            x, v, origin = path.states[k], path.velocities[k], base(path.states[k], chain.times[k])
            for sign, velocity in ((-1, v), (1, origin)):
                ratio += sign * ((path.states[k + 1] - chain.mean(k, x, velocity)) / chain.std[k]).square().sum(1) / 2
            cost += chain.energy[k] / 2 * (v - origin).square().sum(1)
    error = (ratio - cost).std() / 50_000**0.5
    assert ((ratio - cost).mean() / error).abs() < 3
    exact = evaluate_chain(PROBLEM, BETA, np.full(8, 0.5), np.full(8, -0.4)).path_kl
    assert cost.mean().item() == pytest.approx(exact, rel=0.03)


def test_costs_add_over_dimensions() -> None:
    """Log-ratios and costs are sums, not means: three coordinates cost three times as much."""
    costs = []
    for dimension in (1, 3):
        problem = Lqg(dimension=dimension)
        network = LinearPolicy(problem, 0)
        with torch.no_grad():
            network.coefficients.copy_(torch.tensor([[0.2], [-0.1]]))
        base = base_flow(problem)
        x = draw_start(problem, 20_000, base.noise_time, stream(0, "start"))
        method = on_lqg("return", 6)
        tuned = Flow(network, "epsilon", interpolant(problem))
        updates = iterate(
            method,
            tuned,
            base,
            reward_of(problem),
            x,
            stream(0),
            method.new_state((dimension,), 0, x.device),
            start=base.noise_time,
        )
        costs.append(next(updates)["path_kl"])
    assert costs[1] / costs[0] == pytest.approx(3, rel=0.03)


def test_the_kl_of_transitions_is_another_price() -> None:
    chain = ScoreAsAction(solver="ddpm", num_inference_steps=6).sampling.chain(0.1)
    for kind, energy in (("path-kl", chain.energy), ("none", chain.energy), ("transition-kl", chain.control_scale**2)):
        method = ScoreAsAction.model_validate({"solver": "ddpm", "num_inference_steps": 6, "running_reward": kind})
        assert torch.equal(method._energy(chain), energy)
    assert not torch.equal(chain.energy, chain.control_scale**2)


@pytest.mark.parametrize(("h", "change"), [(0.4, 0.73759), (0.2, 0.52830), (0.1, 0.31987), (0.05, 0.17656)])
def test_the_surrogate_is_within_the_kl_of_the_objective(h: float, change: float) -> None:
    """J(mu') - J(mu) from (K, k) = (.2, -.1) to (.2 - h, -.1 + h): known digits; 2.1 to 2.6 KL below its surrogate."""
    before, after = evaluate_policy(PROBLEM, BETA), evaluate_policy(Lqg(K=0.2 - h, k=-0.1 + h), BETA)
    assert after.objective - before.objective == pytest.approx(change, abs=5.1e-6)
    dK, dk = before.gradient
    kl = {0.4: 0.39240, 0.2: 0.09810, 0.1: 0.02452, 0.05: 0.00613}[h]
    second_order = BETA * kl  # the running cost is quadratic: the surrogate is exact to second order in it
    surrogate = -h * dK + h * dk - second_order
    assert (surrogate - (after.objective - before.objective)) / kl == pytest.approx(
        {0.4: 1.60, 0.2: 2.08, 0.1: 2.39, 0.05: 2.56}[h], abs=0.01
    )


# ---- updates ----


def test_the_ratio_is_one_before_the_first_update() -> None:
    method = on_lqg("temporal-difference", 6, update="clip", critic={"network": {"name": "quadratic"}})
    _, tuned = one_iteration(method, count=256)
    (coefficients,) = tuned.parameters()
    assert coefficients.grad is not None


def test_the_ratio_is_that_of_gaussian_densities(generator: torch.Generator) -> None:
    """Of x = m + s eps under a mean moved by s change, summed over the dimensions."""
    noise, change = torch.randn(2, 6, 2, 3, generator=generator)
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = (normal.log_prob(noise - change) - normal.log_prob(noise)).flatten(1).sum(1)
    assert_close(log_ratio(change, noise), expected)


def test_the_penalty_pulls_back_to_the_policy_that_made_the_trajectories() -> None:
    """With a large one, the gradient of a policy that has moved is that of the path KL between the two."""
    base, network = base_flow(PROBLEM), LinearPolicy(PROBLEM, 0)
    tuned, start = Flow(network, "epsilon", interpolant(PROBLEM)), base.noise_time
    method = on_lqg("return", 6, num_passes=2)
    state = method.new_state((1,), 0, torch.device("cpu"))
    state.penalty = 1e9
    x = draw_start(PROBLEM, 256, start, stream(0, "start"))
    updates = iterate(method, tuned, base, reward_of(PROBLEM), x, stream(0), state, start=start)
    next(updates)
    network.coefficients.grad = None
    with torch.no_grad():
        network.coefficients.copy_(torch.tensor([[0.0], [0.3]]))
    next(updates)
    assert network.coefficients.grad is not None
    # 1/2 T k^2 nats for an intercept k
    assert network.coefficients.grad[1].item() == pytest.approx(1e9 * PROBLEM.T * 0.3, rel=1e-6)


class Forgetful(nn.Module):
    """Another velocity whenever gradients are needed, as with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.weight + (x * 0.1 if torch.is_grad_enabled() else x * 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "return", "update": "clip"}, "its logarithm is up to"),
        ({"estimator": "return"}, "the network gives other velocities in training than in sampling"),
        ({"estimator": "closed-form"}, "the network gives other velocities in training than in sampling"),
        ({"estimator": "closed-form", "solver": "heun"}, "the network gives other velocities in training than in sampling"),
    ],
)
def test_a_ratio_that_is_not_one_is_an_error(settings: dict[str, Any], message: str, generator: torch.Generator) -> None:
    law = Mixture().base()
    tuned, base = Flow(CorrectedVelocity(ExactVelocity(law), Forgetful())), Flow(ExactVelocity(law))
    method = ScoreAsAction(num_inference_steps=4, **settings)
    state = method.new_state((2,), 0, torch.device("cpu"))
    x = torch.randn(8, 2, generator=generator)
    updates = iterate(method, tuned, base, Mixture().reward(), x, stream(0), state)
    with pytest.raises(InputError, match=f"before the first update the policy's ratio must be 1, .*{message}"):
        next(updates)


def test_unclipped_gradients_are_those_of_the_trust_region() -> None:
    """At ratio 1 both are the policy gradient."""
    found = []
    for update in ("clip", "trust-region"):
        _, tuned = one_iteration(on_lqg("return", 6, update=update), count=512)
        found.append(next(tuned.parameters()).grad)
    assert_close(found[0], found[1])


def test_the_clip_scales_with_the_root_of_the_step() -> None:
    method = on_lqg("return", 4, update="clip", clip_range=0.2)
    chain = method.sampling.chain(0.1)
    length = chain.times.diff()
    far, advantages = torch.full((4,), 1.0), torch.ones(4)
    clipped = method._clipped(far, advantages, chain, torch.arange(4))
    assert_close(clipped, 1 + 0.2 * length.sqrt())
    assert_close(method._clipped(-far, -advantages, chain, torch.arange(4)), -(1 - 0.2 * length.sqrt()))
    # pessimistic: what is clipped is never what looks better
    assert_close(method._clipped(far, -advantages, chain, torch.arange(4)), torch.full((4,), -math.e))
    fixed = on_lqg("return", 4, update="clip", clip_range=0.2, clip_scaling="none")
    assert_close(fixed._clipped(far, advantages, chain, torch.arange(4)), torch.full((4,), 1.2))


def test_the_penalty_follows_the_path_kl() -> None:
    method, state = ScoreAsAction(target_kl=0.1), State(None, None)  # type: ignore[arg-type]
    for kl, penalty in ((0.16, 2.0), (0.14, 2.0), (0.07, 2.0), (0.06, 1.0), (0.01, 0.5)):
        method._adapt(state, kl)
        assert (state.penalty, state.step_kl) == (penalty, kl)


def test_step_kl_is_the_path_kl_between_the_policies() -> None:
    """(K, k) = (.2, -.1) -> (-.2, .3), in continuous time known to be 0.39240."""
    method = on_lqg("return", 400, num_passes=2)
    problem = PROBLEM
    base, network = base_flow(problem), LinearPolicy(problem, 0)
    with torch.no_grad():
        network.coefficients.copy_(torch.tensor([[0.2], [-0.1]]))
    tuned, start = Flow(network, "epsilon", interpolant(problem)), base.noise_time
    x = draw_start(problem, 4000, start, stream(0, "start"))
    state = method.new_state((1,), 0, x.device)
    updates = iterate(method, tuned, base, reward_of(problem), x, stream(0), state, start=start)
    assert next(updates)["step_kl"] == 0
    with torch.no_grad():
        network.coefficients.copy_(torch.tensor([[-0.2], [0.3]]))
    assert next(updates)["step_kl"] == pytest.approx(0.39240, rel=0.03)


def test_standardised_rewards_are_those_of_ddpo() -> None:
    method = ScoreAsAction(preset="ddpo", num_inference_steps=4)
    assert (method.estimator, method.update, method.clip_range, method.running_reward) == ("return", "clip", 1e-4, "none")
    from tiltflow.control.value import Experience

    rewards, costs = torch.tensor([1.0, 2.0, 3.0, 100.0]), torch.zeros(3, 4)
    batch = Experience(torch.zeros(3, 4, 1), torch.linspace(0, 1, 4), costs, costs, rewards)
    advantages = method._advantages(Value(nn.Identity(), FORMS["reward-free"]), batch, [torch.arange(4)])
    expected = (rewards - rewards.mean()) * 4 / 3 / rewards.std(correction=0)
    assert_close(advantages, expected.expand(3, 4), rtol=1e-6, atol=0)


# ---- the whole ----


def training(method: ScoreAsAction, steps: int, **options: Any) -> tuple[Flow, list[Record]]:
    problem = Mixture(modes=3, radius=1.5, scale=0.5)
    law = problem.base()
    torch.manual_seed(0)
    from tiltflow.networks.mlp import Mlp

    tuned = Flow(CorrectedVelocity(ExactVelocity(law), Mlp(hidden=16, layers=2).build()))
    records = train(
        tuned,
        Flow(ExactVelocity(law)),
        method,
        problem.reward(),
        lambda generator: torch.randn(64, 2, generator=generator),
        max_train_steps=steps,
        **options,
    )
    return tuned, list(records)


RISING: list[tuple[dict[str, Any], str]] = [
    ({}, "reward-free"),
    ({}, "cos-sin"),
    ({"estimator": "temporal-difference"}, "cos-sin"),
    ({"solver": "ddpm"}, "reward-free"),
    ({"solver": "heun"}, "cos-sin"),
]
MORE: list[tuple[dict[str, Any], str]] = [  # of each of both there is one above
    ({"estimator": "temporal-difference"}, "reward-free"),
    ({"solver": "ddpm"}, "cos-sin"),
    ({"solver": "heun"}, "reward-free"),
]


@pytest.mark.parametrize(("settings", "form"), [*RISING, *(pytest.param(*more, marks=pytest.mark.slow) for more in MORE)])
def test_the_objective_rises(settings: dict[str, Any], form: str) -> None:
    method = ScoreAsAction.model_validate({"num_inference_steps": 8, "critic": {"form": form}} | settings)
    _, records = training(method, 60, optimizer=Optimizer(learning_rate=1e-2))
    first, last = (sum(r.metrics["objective"] for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last > first + 0.2


def test_two_runs_are_the_same_bit_for_bit() -> None:
    runs = [training(ScoreAsAction(num_inference_steps=5, critic=Critic(train_batch_size=16)), 6) for _ in range(2)]
    assert [r.metrics for r in runs[0][1]] == [r.metrics for r in runs[1][1]]
    for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_micro_batches_change_the_memory_only(estimator: str) -> None:
    found = []
    for size in (None, 5):
        method = ScoreAsAction.model_validate(
            {"num_inference_steps": 5, "estimator": estimator, "critic": {"form": "constant-skip"}}
        )
        tuned, _ = training(method, 3, micro_batch_size=size)
        found.append(torch.cat([p.detach().flatten() for p in tuned.parameters()]))
    assert_close(found[0], found[1], atol=1e-9, rtol=1e-7)


def test_network_evaluations() -> None:
    """A step of a chain: tuned and base once for the trajectory, tuned once for each pass; the last step is the base's."""
    method = ScoreAsAction(num_inference_steps=5, num_passes=3)
    _, records = training(method, 3)
    assert records[-1].network_evaluations == 64 * (4 + 5 + 3 * 4)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0}, "greater than 0"),
        ({"solver": "huen"}, "there is no solver 'huen', did you mean 'heun'"),
        ({"solver": "heun", "estimator": "return"}, "estimator 'return' needs a solver with noise, heun has none"),
        ({"solver": "ddim", "eta": 0, "estimator": "return"}, "needs a solver with noise, ddim has none"),
        ({"update": "clip", "estimator": "closed-form"}, "requires an advantage"),
        ({"standardize": True}, "standardize is for the estimator 'return' alone"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ScoreAsAction(**settings)


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (lambda x: x[:, 0] * math.nan, NonFiniteError, "the reward is not finite for 8 of 8 samples"),
        (lambda x: x, InputError, r"one number per sample, shape \[8\], got \[8, 2\]"),
    ],
)
def test_rewards_that_make_no_sense_are_refused(reward: Callable[[Tensor], Tensor], error: Any, message: str) -> None:
    law: GaussianMixture = Mixture().base()
    method = ScoreAsAction(num_inference_steps=3)
    state = method.new_state((2,), 0, torch.device("cpu"))
    updates = iterate(method, Flow(ExactVelocity(law)), Flow(ExactVelocity(law)), reward, torch.randn(8, 2), stream(0), state)
    with pytest.raises(error, match=message):
        next(updates)


def test_a_broken_critic_is_refused_before_the_first_update() -> None:
    method = ScoreAsAction(num_inference_steps=3, critic=Critic(form="test_value:broken_at_the_end"))
    with pytest.raises(InputError, match=r"V\(1, x\) must be r\(x\)"):
        training(method, 1)


# ---- gradients through the reward ----


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"estimator": "pathwise"}, True),
        ({"estimator": "closed-form"}, False),
        ({"estimator": "closed-form", "critic": {"form": "cos-sin"}}, True),
        ({"estimator": "return-minus-value", "critic": {"form": "cos-sin"}}, False),
        ({"estimator": "return"}, False),
    ],
)
def test_who_needs_the_gradient_of_the_reward(settings: dict[str, Any], needed: bool) -> None:
    assert ScoreAsAction(**settings).needs.reward_gradient is needed


def test_pathwise_pulls_the_reward_back_through_the_last_step_of_the_base() -> None:
    """The default chain ends in a noiseless step of the base: the last vector is the gradient of r(that step), by autograd."""
    base = GaussianMixture(torch.tensor([0.6, 0.4]).log(), torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), torch.tensor([0.15, 0.3]))
    shift = nn.Parameter(torch.zeros(5, 2))
    method = ScoreAsAction(estimator="pathwise", num_inference_steps=5, num_passes=1, beta=0.7, critic={"num_steps": 0})
    chain = method.sampling.chain()

    def tuned(x: Tensor, t: Tensor) -> Tensor:
        k = (t.reshape(-1, 1) - chain.times).abs().argmin(1)
        return base.velocity(x, t) + shift[k]

    def reward(x: Tensor) -> Tensor:
        return x[:, 0].sin() + (x[:, 1] ** 3) / 3

    x, state = torch.randn(6, 2, generator=stream(3)), method.new_state((2,), 0, torch.device("cpu"))
    list(iterate(method, FunctionField(tuned), FunctionField(base.velocity), reward, x, stream(4), state))
    before = rollout(chain, base.velocity, x, stream(4)).states[4].requires_grad_()
    end = chain.mean(4, before, base.velocity(before, chain.times[4]))
    (vectors,) = torch.autograd.grad(reward(end).sum(), before)
    assert shift.grad is not None
    assert_close(shift.grad[3], -chain.v_scale[3] * vectors.mean(0) / 0.7)


def test_the_law_aimed_at_is_the_reward_over_the_temperature() -> None:
    """On two modes under tanh x: the mean reward of the tilt by quadrature, 0.61689 at beta = 1 and 0.89566 at 0.3."""
    problem = TwoModes()
    law = problem.law()
    for beta, mean_reward in ((1.0, 0.61689), (0.3, 0.89566)):
        tilted = ScoreAsAction(beta=beta).target(1).law(law, problem.reward_at)
        assert tilted.expectation(problem.reward_at) == pytest.approx(mean_reward, abs=5e-6)


def test_a_single_return_teaches_nothing_and_a_value_does() -> None:
    assert "always 0" in str(ScoreAsAction(estimator="return").learns_nothing(1))
    assert ScoreAsAction(estimator="return").learns_nothing(2) is None
    assert ScoreAsAction().learns_nothing(1) is None


def test_what_a_change_of_each_step_costs() -> None:
    """On a grid of three steps, by hand; the last one has no noise, belongs to the base, and costs nothing."""
    priced = ScoreAsAction(num_inference_steps=3).priced_chain()
    assert priced is not None
    chain, energy = priced
    assert energy.tolist()[-1] == 0
    # the jump: mean t_1 (x + v), noise 1 - t_1, at t_1 = 1/3; the step of the SDE: v_scale 2 h, variance h 2 (1 - t) / t
    first, second = (1 / 3 / (2 / 3)) ** 2, (1 / 3 * 2) ** 2 / (1 / 3 * 2 * (2 / 3) / (1 / 3))
    assert energy.tolist()[:-1] == pytest.approx([first, second])
    assert len(energy) == len(chain) == 3
    euler = ScoreAsAction(num_inference_steps=3, solver="euler", estimator="closed-form").priced_chain()
    assert euler is not None
    assert (euler[1] > 0).all()  # without noise every step is an action
    assert ScoreAsAction(solver="heun", estimator="closed-form").priced_chain() is None
    assert ScoreAsAction(running_reward="none").priced_chain() is None
