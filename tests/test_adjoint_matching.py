"""Adjoint Matching: its fixed points against Riccati's and known digits, its gradient against one derived by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import affine
import pytest
import torch
from affine import Affine, Controlled, on_gaussian, riccati
from tiny import iterate
from torch import Tensor, nn
from torch.testing import assert_close

from tiltflow.control.adjoint import lean_adjoint
from tiltflow.control.objective import Objective
from tiltflow.control.timesteps import Stratum
from tiltflow.errors import InputError, NonFiniteError, SettingsError
from tiltflow.flows.field import FunctionField
from tiltflow.laws.gaussian_mixture import GaussianMixture, QuadraticReward
from tiltflow.methods.adjoint_matching import AdjointMatching, State, TailPool
from tiltflow.problems.mixture import Mixture
from tiltflow.problems.two_modes import TwoModes
from tiltflow.samplers.chain import Chain, sde
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.rollout import rollout
from tiltflow.samplers.solvers.ddim import ddim
from tiltflow.samplers.solvers.euler import euler
from tiltflow.samplers.solvers.memoryless import memoryless
from tiltflow.samplers.solvers.memoryless_offset import memoryless_offset
from tiltflow.streams import stream
from tiltflow.training.optimizer import Optimizer, fill_optimizer
from tiltflow.utilities.estimation.tail_pool import Pool

pytestmark = pytest.mark.usefixtures("double")

SOLVERS = ("memoryless", "memoryless-offset", "ddpm", "ddim-half-way")
MIXTURE = Mixture(modes=3, radius=1.5, scale=0.5).base()
FIELD = FunctionField(MIXTURE.velocity)


def noisy_to_the_end(times: Tensor) -> Chain:
    return memoryless(times, denoise=False)


def ddpm(times: Tensor) -> Chain:
    return ddim(times, eta=1.0)


def linear_reward() -> QuadraticReward:
    return QuadraticReward(torch.tensor([affine.LINEAR]))


def quadratic_reward(quadratic: float = affine.QUADRATIC) -> QuadraticReward:
    return QuadraticReward(torch.tensor([affine.LINEAR]), quadratic)


def one_iteration(method: AdjointMatching, tuned: Any, reward: Any, *, batch: int = 8, seed: int = 0, **options: Any) -> Any:
    """What the method measures, on a Gaussian base; the gradients of its passes add up in `tuned`."""
    x = torch.randn(batch, 1, generator=stream(seed, "start"))
    state = options.pop("state", State())
    return list(
        iterate(
            method, FunctionField(tuned), FunctionField(affine.velocity), reward, x, stream(seed, "noise"), state, **options
        )
    )


# ---- fixed points ----


def regress(chain: Chain, controls: tuple[Tensor, Tensor], reward: QuadraticReward, **options: Any) -> tuple[Tensor, Tensor]:
    """One exact regression: w_k(x) = -s_k E[target_k | X_k = x] on trajectories of the chain under `controls`.

    On a Gaussian the target is affine in x and in the noise to come, so a trajectory without noise from X_k = x has the
    conditional expectation exactly, and two values of x have the whole function. Sample 2k + x starts at X_k = x.
    """
    steps, tuned = len(chain), on_gaussian(chain).controlled(*controls)
    x, states = torch.zeros(2 * steps, 1), []
    for k in range(steps):
        x = x.clone()
        x[2 * k], x[2 * k + 1] = 0, 1
        states.append(x)
        x = tuned.gain[k] * x + tuned.offset[k]
    if "bootstrap" in options:
        options["tuned_velocities"] = [
            affine.velocity(x, chain.times[k]) + (controls[0][k] * x + controls[1][k]) * chain.std[k] / chain.v_scale[k]
            for k, x in enumerate(states)
        ]
    targets = lean_adjoint(chain, FunctionField(affine.velocity), [*states, x], Objective(reward), 1.0, **options).targets
    at_0 = torch.stack([target[2 * k, 0] for k, target in enumerate(targets)])
    at_1 = torch.stack([target[2 * k + 1, 0] for k, target in enumerate(targets)])
    return -chain.std * (at_1 - at_0), -chain.std * at_0


def fixed_point(chain: Chain, **options: Any) -> tuple[Tensor, Tensor]:
    controls = torch.zeros(len(chain)), torch.zeros(len(chain))
    for _ in range(60):  # at q s^2 = 0.75 the error falls faster than geometrically
        before, controls = controls, regress(chain, controls, quadratic_reward(), **options)
        if max((new - old).abs().max() for new, old in zip(controls, before, strict=True)) < 1e-14:
            return controls
    raise AssertionError("the rounds do not converge")


def objective(chain: Affine, controls: tuple[Tensor, Tensor]) -> Tensor:
    """E[sum_k |w_k|^2 / 2 - r(X_K)]."""
    mean, variance = chain.controlled(*controls).law()
    return chain.path_kl(*controls) + affine.QUADRATIC / 2 * (mean**2 + variance) - affine.LINEAR * mean


def objective_gradient(chain: Affine, controls: tuple[Tensor, Tensor]) -> float:
    free = tuple(c.clone().requires_grad_() for c in controls)
    return max(g.abs().max().item() for g in torch.autograd.grad(objective(chain, free), free))


@pytest.mark.parametrize(
    ("make", "steps", "mean", "variance"),
    [
        (memoryless_offset, 10, 0.65594, 0.19047),
        (memoryless_offset, 40, 0.64710, 0.15426),
        (ddpm, 10, 0.65874, 0.11023),
        (ddpm, 40, 0.64787, 0.13326),
        (noisy_to_the_end, 10, 0.64229, 0.16152),
        (noisy_to_the_end, 20, 0.64273, 0.15090),
        (noisy_to_the_end, 40, 0.64283, 0.14663),
        (memoryless, 10, 0.64196, 0.16683),
        (memoryless, 20, 0.64269, 0.15146),
        (memoryless, 40, 0.64282, 0.14669),
        (memoryless, 100, 0.64285, 0.14432),
    ],
)
def test_fixed_point_is_the_optimal_control(make: Callable[[Tensor], Chain], steps: int, mean: float, variance: float) -> None:
    chain = make(time_grid(steps))
    base, controls = on_gaussian(chain), fixed_point(chain)
    assert_close(controls, riccati(base), rtol=0, atol=1e-10)
    assert objective_gradient(base, controls) < 1e-8
    law = base.controlled(*controls).law()
    assert (law[0].item(), law[1].item()) == pytest.approx((mean, variance), abs=5.1e-6)


@pytest.mark.parametrize("make", [noisy_to_the_end, memoryless, memoryless_offset])
@pytest.mark.parametrize("bootstrap", [0.2, 1.0, 5.0])
def test_bootstrapping_keeps_the_fixed_point(make: Callable[[Tensor], Chain], bootstrap: float) -> None:
    chain = make(time_grid(20))
    assert_close(fixed_point(chain, bootstrap=bootstrap), riccati(on_gaussian(chain)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bootstrap", [0.0, 0.5, 3.0])
def test_bootstrapping_lowers_the_noise_as_derived(bootstrap: float) -> None:
    """At the optimum the loss is the variance of the targets. With y_k = E[a_{k+1} | x_k] = -(slope_k x_k + shift_k) / s_k
    and e_k = a_k - E[a_k | x_{k-1}], the recursion a_k = gain_k (y_k + lambda_k e_{k+1}) gives
    Var e_k = gain_k^2 ((slope_k s_{k-1} / s_k)^2 + lambda_k^2 Var e_{k+1})."""
    method = AdjointMatching(num_inference_steps=8, bootstrap=bootstrap)
    chain = method.chain()
    base = on_gaussian(chain)
    slope, shift = riccati(base)
    variance = (affine.QUADRATIC * base.gain[-1] ** 2 * chain.std[-2]) ** 2  # no noise in the last step
    expected = torch.zeros(())
    for k in range(len(chain) - 2, -1, -1):
        expected = expected + chain.std[k] ** 2 * variance
        if k > 0:
            kept = math.exp(-2 * bootstrap * chain.std[k] ** 2) * variance
            variance = base.gain[k] ** 2 * ((slope[k] * chain.std[k - 1] / chain.std[k]) ** 2 + kept)
    losses = torch.tensor(
        [
            one_iteration(method, Controlled(chain, slope, shift), quadratic_reward(), batch=400, seed=i)[0]["loss"]
            for i in range(25)
        ]
    )
    assert abs(losses.mean() - expected) < 4 * losses.std() / 5


@pytest.mark.parametrize(
    ("method", "steps", "mean", "variance"),
    [
        ({"solver": "memoryless", "pairing": "after"}, 12, 0.24102, 0.31999),
        ({"solver": "memoryless", "pairing": "before"}, 12, 0.16607, 0.33333),
        ({"solver": "memoryless", "pairing": "after"}, 30, 0.23843, 0.29733),
        ({"solver": "ddpm", "pairing": "after"}, 15, 0.14146, 0.25822),
        ({"solver": "memoryless-offset", "pairing": "right"}, 20, 0.28523, 0.31524),
    ],
)
def test_what_is_reached_from_another_gaussian_at_another_temperature(
    method: dict[str, str], steps: int, mean: float, variance: float
) -> None:
    """N(-0.4, 0.6) under 0.9 x - 0.55 x^2 at beta 0.6, whose tilt is N(0.23810, 0.28571): rounds of exact regressions."""
    m, v, reward = -0.4, 0.6, QuadraticReward(torch.tensor([0.9]), 1.1)
    settings = AdjointMatching(num_inference_steps=steps, beta=0.6, **method)
    chain, base = settings.chain(), on_gaussian(settings.chain(), m, v)
    options: dict[str, Any] = {"pairing": settings.pairing}
    if settings.pairing == "right":
        options["right"] = memoryless_offset(chain.times + 1 / steps)
    controls = torch.zeros(steps), torch.zeros(steps)
    for _ in range(80):
        tuned, x, states = base.controlled(*controls), torch.zeros(2 * steps, 1), []
        for k in range(steps):
            x = x.clone()
            x[2 * k], x[2 * k + 1] = 0, 1
            states.append(x)
            x = tuned.gain[k] * x + tuned.offset[k]
        field = FunctionField(lambda x, t: affine.velocity(x, t, m, v))
        adjoint = lean_adjoint(chain, field, [*states, x], Objective(reward), settings.beta, **options)
        ends = torch.stack([target[2 * k : 2 * k + 2, 0] for k, target in enumerate(adjoint.targets)])
        controls = -chain.std * ends.diff(dim=1)[:, 0], -chain.std * ends[:, 0]
    law = base.controlled(*controls).law()
    assert (law[0].item(), law[1].item()) == pytest.approx((mean, variance), abs=5.1e-6)


class AffineShift(nn.Module):
    """The velocity of two modes plus a + b x, the same at all times: a class that the optimal control is far from."""

    law = GaussianMixture(
        torch.tensor([0.6, 0.4], dtype=torch.float64).log(),
        torch.tensor([[-1.5], [1.5]], dtype=torch.float64),
        torch.tensor([0.15, 0.3], dtype=torch.float64),
    )

    def __init__(self, a: float, b: float):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([a, b]))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.law.velocity(x, t) + self.weights[0] + self.weights[1] * x


@pytest.mark.parametrize(
    ("bootstrap", "weights", "mean_reward"),
    [
        (0.0, (0.71346009, -0.52256648), -0.1490),
        (0.5, (0.68454930, -0.50302856), -0.1726),
        (1.0, (0.65743085, -0.48536014), -0.1952),
        (2.0, (0.61206217, -0.45700015), -0.2341),
    ],
)
def test_bootstrapping_moves_the_fixed_point_of_a_network_that_cannot_be_optimal(
    bootstrap: float, weights: tuple[float, float], mean_reward: float
) -> None:
    """The fixed points and their mean rewards are from exact regressions on a grid, at 12 steps; the tilt has 0.269."""
    more = 3 * bootstrap + 1
    gradients: dict[float, list[Tensor]] = {bootstrap: [], more: []}
    reward, rewards = QuadraticReward(torch.tensor([0.8]), 0.7), []
    for seed in range(20):
        for value, found in gradients.items():
            method, tuned = AdjointMatching(num_inference_steps=12, beta=0.6, bootstrap=value), AffineShift(*weights)
            x = torch.randn(3000, 1, generator=stream(seed, "start"))
            fields = FunctionField(tuned), FunctionField(AffineShift.law.velocity)
            (measured,) = iterate(method, *fields, reward, x, stream(seed, "noise"), State())
            found.append(tuned.weights.grad)
        rewards.append(measured["reward"])
    z = {value: torch.stack(found).mean(0) / torch.stack(found).std(0) * 20**0.5 for value, found in gradients.items()}
    assert z[bootstrap].abs().max() < 4
    assert z[more].abs().max() > 5
    error = torch.tensor(rewards).std() / 20**0.5
    assert abs(torch.tensor(rewards).mean() - mean_reward) < 4 * error


def test_the_law_aimed_at_is_the_reward_over_the_temperature() -> None:
    """On two modes under tanh x: the mean reward of the tilt by quadrature, 0.89566 at beta = 0.3."""
    method, problem = AdjointMatching(beta=0.3), TwoModes()
    tilted = method.target(1).law(problem.law(), problem.reward_at)
    assert tilted.expectation(problem.reward_at) == pytest.approx(0.89566, abs=5e-6)


@pytest.mark.parametrize(
    ("make", "steps", "mean", "variance"),
    [
        (memoryless_offset, 10, 0.66857, 0.19959),
        (memoryless_offset, 40, 0.64969, 0.15663),
        (ddpm, 10, 0.66826, 0.11669),
        (ddpm, 40, 0.65036, 0.13560),
        (noisy_to_the_end, 10, 0.65294, 0.17066),
        (noisy_to_the_end, 40, 0.64529, 0.14903),
    ],
)
def test_pairing_before_is_biased_as_known(make: Callable[[Tensor], Chain], steps: int, mean: float, variance: float) -> None:
    chain = make(time_grid(steps))
    base, controls = on_gaussian(chain), fixed_point(chain, pairing="before")
    law = base.controlled(*controls).law()
    assert (law[0].item(), law[1].item()) == pytest.approx((mean, variance), abs=5.1e-6)
    assert objective_gradient(base, controls) > 1e-3


@pytest.mark.parametrize(("steps", "mean", "variance"), [(10, 0.65134, 0.18276), (40, 0.64618, 0.15259)])
def test_pairing_right_is_biased_as_known(steps: int, mean: float, variance: float) -> None:
    chain, right = memoryless_offset(time_grid(steps)), memoryless_offset(time_grid(steps) + 1 / steps)
    base, controls = on_gaussian(chain), fixed_point(chain, pairing="right", right=right)
    law = base.controlled(*controls).law()
    assert (law[0].item(), law[1].item()) == pytest.approx((mean, variance), abs=5.1e-6)
    assert objective_gradient(base, controls) > 1e-3


@pytest.mark.parametrize(
    ("sigma", "mean", "variance"), [(0.2, 0.6892, 0.2132), (0.5, 0.6614, 0.1541), (1.0, 0.6443, 0.1429), (None, 0.6429, 0.1429)]
)
def test_noise_that_remembers_is_biased_as_known(sigma: float | None, mean: float, variance: float) -> None:
    """Tuned under constant noise, the mean is off the tilt by what X_0 and X_1 share (None: memoryless, not off)."""

    def chain(steps: int) -> Chain:
        times = time_grid(steps)
        return memoryless(times) if sigma is None else sde(times, lambda t: torch.full_like(t, sigma))

    assert_close(fixed_point(chain(20)), riccati(on_gaussian(chain(20))), rtol=0, atol=1e-10)

    def law(steps: int) -> Tensor:
        base = on_gaussian(chain(steps))
        return torch.stack(base.controlled(*riccati(base)).law())

    limit = 2 * law(800) - law(400)  # Richardson: the error left is of order h^2
    assert limit.tolist() == pytest.approx([mean, variance], abs=5.1e-5)


@pytest.mark.parametrize(
    ("steps", "value", "path_kl", "mean", "variance"),
    [
        (10, -0.166687, 0.064119, 0.64853, 0.12150),
        (20, -0.178465, 0.068170, 0.64573, 0.13174),
        (40, -0.182910, 0.070118, 0.64431, 0.13720),
        (100, -0.185215, 0.071279, 0.64344, 0.14057),
        (200, -0.185930, 0.071666, 0.64315, 0.14171),
    ],
)
def test_optimum_has_its_known_value_and_serves_the_ode(
    steps: int, value: float, path_kl: float, mean: float, variance: float
) -> None:
    """The value tends to V(x, 0) = -0.186621, the path KL to KL(p*, p) = 0.072053, the law of the ODE to the tilt."""
    chain, ode = noisy_to_the_end(time_grid(steps)), on_gaussian(euler(time_grid(steps)))
    base = on_gaussian(chain)
    controls = riccati(base)
    assert objective(base, controls).item() == pytest.approx(value, abs=5.1e-7)
    assert base.path_kl(*controls).item() == pytest.approx(path_kl, abs=5.1e-7)
    slope, shift = (c / chain.control_scale / steps for c in controls)
    law = Affine(ode.gain + slope, ode.offset + shift, ode.std).law()
    assert (law[0].item(), law[1].item()) == pytest.approx((mean, variance), abs=5.1e-6)


@pytest.mark.parametrize(
    ("quadratic", "errors"),
    [(2.0, {1: 3.6e-2, 5: 3.7e-6}), (8.0, {1: 0.36, 5: 1.9e-3}), (20.0, {1: 1.4, 5: 4.6e-2, 20: 1.8e-11})],
)
def test_rounds_of_exact_regression_converge_as_known(quadratic: float, errors: dict[int, float]) -> None:
    chain = noisy_to_the_end(time_grid(40))
    optimum, _ = riccati(on_gaussian(chain), 0.0, quadratic)
    controls = torch.zeros(40), torch.zeros(40)
    for number in range(1, max(errors) + 1):
        controls = regress(chain, controls, QuadraticReward(torch.zeros(1), quadratic))
        if number in errors:
            assert (controls[0] - optimum).abs().max().item() == pytest.approx(errors[number], rel=0.05)


def test_large_beta_leaves_the_base() -> None:
    method = AdjointMatching(beta=1e9, num_inference_steps=8)
    tuned = Controlled(method.chain())
    (measured,) = one_iteration(method, tuned, quadratic_reward())
    # a = -grad r / beta with |grad r| < 20, gains and noise of order 1
    assert measured["loss"] < (20 / 1e9) ** 2 * 8
    assert tuned.shift.grad.abs().max() < 2 * 20 / 1e9


# ---- a linear reward: targets are deterministic, everything is exact ----


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("start", [0.0, 0.1])
def test_loss_is_zero_at_the_optimum_of_a_linear_reward(solver: str, start: float) -> None:
    method = AdjointMatching(solver=solver, num_inference_steps=9, beta=0.5)
    chain = method.chain(start)
    slope, shift = riccati(on_gaussian(chain), affine.LINEAR / 0.5, 0.0)
    tuned = Controlled(chain, slope, shift)
    (measured,) = one_iteration(method, tuned, linear_reward(), start=start)
    assert measured["loss"] < 1e-24
    assert measured["path_kl"] == pytest.approx(shift.square().sum().item() / 2)
    # rounding of 1e-15 in a term times its slope, which is below 10
    assert tuned.shift.grad.abs().max() < 1e-13
    assert tuned.slope.grad.abs().max() < 1e-13


def adjoints(chain: Chain, pairing: str) -> Tensor:
    """What each step regresses on under r = c x and beta = 1, from products of gains; 0 for a last step without noise."""
    if pairing == "right":  # h later, where the drift is that of the next step
        h = chain.times[1] - chain.times[0]
        t = chain.times[1:]
        gain = 1 + h * (2 * affine.slope(t) - 1 / (t + h))
    else:
        gain = on_gaussian(chain).gain
    shift = 1 if pairing == "after" else 0
    a = torch.stack([-affine.LINEAR * gain[k + shift :].prod() for k in range(len(chain))])
    if pairing == "before-diffusion":
        norm = torch.hypot(chain.times, 1 - chain.times)
        a = a * norm[:-1] / norm[1:]
    return torch.where(chain.std > 0, a, 0.0)


@pytest.mark.parametrize(
    ("solver", "pairing"),
    [(solver, pairing) for solver in SOLVERS for pairing in ("after", "before")] + [("memoryless-offset", "right")],
)
@pytest.mark.parametrize("start", [0.0, 0.1])
def test_loss_and_gradient_without_control(solver: str, pairing: str, start: float) -> None:
    """Without control a step has the term (s a)^2, and its shift the gradient 2 s a."""
    method = AdjointMatching(solver=solver, pairing=pairing, num_inference_steps=9)
    chain = method.chain(start)
    tuned = Controlled(chain)
    (measured,) = one_iteration(method, tuned, linear_reward(), start=start)
    target = chain.std * adjoints(chain, pairing)
    assert measured["loss"] == pytest.approx(target.square().sum().item())
    assert measured["path_kl"] < 1e-28
    assert measured["clipped"] == 0
    assert_close(tuned.shift.grad, 2 * target, rtol=1e-12, atol=1e-14)


# ---- a bent problem ----


def bent(x: Tensor) -> Tensor:
    return torch.sin(2 * x[:, 0]) - x[:, 1] ** 4 / 4 + x[:, 0] * x[:, 1]


class Corrected(nn.Module):
    """The velocity of the mixture, a little bent by parameters. Notes on which batches it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, -0.2], [0.1, 0.4]]))
        self.bias = nn.Parameter(torch.tensor([0.2, -0.1]))
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked.append((x, t))
        return MIXTURE.velocity(x, t) + torch.tanh(x @ self.weight + t.reshape(-1, 1)) + self.bias


def bent_iteration(method: AdjointMatching, tuned: Corrected, batch: int = 6, **options: Any) -> list[dict[str, float]]:
    x = torch.randn(batch, 2, generator=stream(3))
    state = options.pop("state", State())
    reward = options.pop("reward", bent)
    return list(iterate(method, FunctionField(tuned), FIELD, reward, x, stream(4), state, **options))


def terms_by_hand(chain: Chain, tuned: Corrected, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(|w_k + s_k a_{k+1}|^2 [steps, batch] with its graph, |w_k|^2, rewards), a by autograd through the chain."""
    x = torch.randn(6, 2, generator=stream(3))
    with torch.no_grad():
        states = list(rollout(chain, tuned, x, stream(4)).states)
    if chain.std[-1] == 0:
        states.append(chain.mean(len(chain) - 1, states[-1], MIXTURE.velocity(states[-1], chain.times[-2])))
    terms, energies = [], []
    for k in range(len(chain)):
        if chain.std[k] == 0:
            continue
        y = start = states[k + 1].clone().requires_grad_()
        for j in range(k + 1, len(chain)):
            y = chain.mean(j, y, MIXTURE.velocity(y, chain.times[j]))
            y = y + (states[j + 1] - y).detach()  # the noise that was drawn
        (a,) = torch.autograd.grad(-bent(y).sum() / beta, start)
        mean = chain.mean(k, states[k], tuned(states[k], chain.times[k]))
        base_mean = chain.mean(k, states[k], MIXTURE.velocity(states[k], chain.times[k]))
        control = (mean - base_mean) / chain.std[k]
        terms.append((control + chain.std[k] * a).square().sum(1))
        energies.append(control.detach().square().sum(1))
    return torch.stack(terms), torch.stack(energies), bent(states[-1])


def gradients_of(loss: Tensor, tuned: Corrected) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (tuned.weight, tuned.bias), retain_graph=True)


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradient_is_the_one_derived_by_hand(solver: str) -> None:
    method, tuned = AdjointMatching(solver=solver, num_inference_steps=5, shift=2.0, beta=0.7), Corrected()
    (measured,) = bent_iteration(method, tuned, start=0.05)
    terms, energies, rewards = terms_by_hand(method.chain(0.05), tuned, 0.7)
    assert_close((tuned.weight.grad, tuned.bias.grad), gradients_of(terms.sum(0).mean(), tuned))
    assert measured["loss"] == pytest.approx(terms.sum(0).mean().item())
    assert measured["path_kl"] == pytest.approx(energies.sum(0).mean().item() / 2)
    assert measured["reward"] == pytest.approx(rewards.mean().item())
    assert measured["reward_std"] == pytest.approx(rewards.std(correction=0).item())
    assert measured["clipped"] == 0


def test_clipped_terms_have_no_gradient() -> None:
    """The limit is loss_clip / beta^2 on terms over h: the grid is uneven, so that h matters."""
    method = AdjointMatching(num_inference_steps=5, shift=2.0, beta=0.7, loss_clip=1.0)
    chain, tuned = method.chain(), Corrected()
    terms, _, _ = terms_by_hand(chain, tuned, 0.7)
    h = chain.times.diff()[:4, None]
    level = torch.quantile((terms / h).detach(), 0.6).item()  # some are clipped, some are not
    method = method.model_copy(update={"loss_clip": level * 0.7**2})
    tuned.zero_grad()
    (measured,) = bent_iteration(method, tuned)
    small = (terms / h).detach() < level
    assert_close((tuned.weight.grad, tuned.bias.grad), gradients_of((terms * small).sum(0).mean(), tuned))
    assert measured["clipped"] == pytest.approx(1 - small.double().mean().item())
    assert measured["loss"] == pytest.approx(terms.sum(0).mean().item())  # the loss itself is shown whole


def test_terms_above_the_running_quantile_are_dropped() -> None:
    """Threshold: a plain mean of the first two quantiles, then 0.9 of the old one."""
    method = AdjointMatching(num_inference_steps=9, drop_quantile=0.9)
    chain = method.chain()
    tuned, state = Controlled(chain), State()
    size = (chain.std * adjoints(chain, "after")).abs()[:8]  # the roots of the terms, the same for every sample
    quantile = torch.quantile(size.repeat_interleave(8), 0.9)
    for factor, threshold in ((1, 1.0), (2, 1.5), (4, 0.9 * 1.5 + 0.1 * 4), (4, 0.9 * (0.9 * 1.5 + 0.1 * 4) + 0.1 * 4)):
        tuned.zero_grad()
        reward = QuadraticReward(torch.tensor([affine.LINEAR * factor]))
        (measured,) = one_iteration(method, tuned, reward, state=state)
        assert state.threshold == pytest.approx(threshold * quantile.item())
        kept = factor * size <= threshold * quantile
        assert measured["clipped"] == 1 - kept.double().mean().item()
        assert torch.equal(tuned.shift.grad[:8] != 0, kept)


def test_the_quantile_is_that_of_the_terms_in_the_loss_of_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the root of a term is |s_k a_k| times its sample's slope. Of the first group a tenth is dropped, two
    terms of twenty; the second is held to the mean of both quantiles, the third to 0.9 of that and a tenth of its own."""
    steps = torch.tensor([[1, 6, 13, 17], [4, 9, 15, 18], [0, 2, 12, 16]])  # of each group of five samples
    slope = torch.tensor([1.0, 2, 3, 4, 5, 9, 8, 7, 6, 5, 0.1, 0.2, 0.3, 0.4, 0.5])
    pairs = steps.repeat_interleave(5, 0).T
    monkeypatch.setattr("tiltflow.methods.adjoint_matching.choose_timesteps", lambda *_, **__: pairs)
    method = AdjointMatching(preset="official-code", num_inference_steps=20)
    chain, state = method.chain(), State()
    tuned = Controlled(chain)
    (measured,) = one_iteration(method, tuned, lambda x: slope * x[:, 0], batch=15, state=state)

    target = -(chain.std * adjoints(chain, "before-diffusion"))[pairs] * slope / affine.LINEAR
    thresholds, mean = [], 0.0
    for decay, group in zip((0, 0.5, 0.9), target.abs().split(5, 1), strict=True):
        ordered = group.flatten().sort().values
        mean = decay * mean + (1 - decay) * (0.9 * ordered[17] + 0.1 * ordered[18]).item()  # 0.9 of the way from 1st to 20th
        thresholds.append(mean)
    assert state.threshold == pytest.approx(mean)
    kept = target.abs() < torch.tensor(thresholds).repeat_interleave(5)
    assert kept[:, :5].sum() == 18
    assert measured["clipped"] == pytest.approx(1 - kept.double().mean().item())
    expected = torch.zeros(20).index_add(0, pairs.flatten(), (-2 * target * kept / 15).flatten())
    assert_close(tuned.shift.grad, expected, rtol=1e-10, atol=1e-12)


def test_a_term_at_the_limit_is_kept() -> None:
    """Only terms above it are clipped. In two steps without drift the one term is (s a)^2 = (1 / 2)^2, in exact binary."""

    def still(x: Tensor, t: Tensor) -> Tensor:
        return 0 * x

    for limit, clipped in ((0.25, 0.0), (0.25 - 1e-9, 1.0)):
        method = AdjointMatching(num_inference_steps=2, loss_clip=2 * limit)  # h = 1 / 2
        shift = nn.Parameter(torch.zeros(1))
        x, reward = torch.zeros(4, 1), QuadraticReward(torch.ones(1))
        tuned, base = FunctionField(lambda x, t, s=shift: s.expand_as(x)), FunctionField(still)
        (measured,) = iterate(method, tuned, base, reward, x, stream(0), State())
        assert (measured["loss"], measured["clipped"]) == (0.25, clipped)
        assert (shift.grad.item() == 0) == bool(clipped)


def test_clip_and_quantile_together_keep_what_both_keep() -> None:
    tuned = Corrected()
    counts = []
    for options in ({"loss_clip": 3.0}, {"drop_quantile": 0.6}, {"loss_clip": 3.0, "drop_quantile": 0.6}):
        (measured,) = bent_iteration(AdjointMatching(num_inference_steps=5, **options), tuned)
        counts.append(measured["clipped"])
    assert max(counts[:2]) <= counts[2] <= sum(counts[:2])
    assert 0 < counts[0] < 1


@pytest.mark.parametrize("size", [1, 4, 6, 100])
@pytest.mark.parametrize(("pairing", "bootstrap"), [("after", 0.0), ("after", 0.7), ("right", 0.0)])
def test_micro_batches_change_the_memory_only(size: int, pairing: str, bootstrap: float) -> None:
    options: dict[str, Any] = {"pairing": pairing, "bootstrap": bootstrap, "loss_clip": 3.0, "drop_quantile": 0.6}
    method = AdjointMatching(solver="memoryless-offset", num_inference_steps=5, num_passes=2, **options)
    whole, parts = Corrected(), Corrected()
    ours, theirs = bent_iteration(method, parts, micro_batch_size=size), bent_iteration(method, whole)
    assert ours[0] == pytest.approx(theirs[0])
    assert_close((parts.weight.grad, parts.bias.grad), (whole.weight.grad, whole.bias.grad), rtol=1e-12, atol=1e-12)
    assert max(len(x) for x, _ in parts.asked) <= size
    assert max(len(x) for x, _ in whole.asked) == 6


def test_every_pass_has_its_gradient() -> None:
    method, tuned = AdjointMatching(num_inference_steps=5, num_passes=3), Corrected()
    x = torch.randn(6, 2, generator=stream(3))
    terms, _, _ = terms_by_hand(method.chain(), tuned, 1.0)
    expected = gradients_of(terms.sum(0).mean(), tuned)
    passes = 0
    for _ in iterate(method, FunctionField(tuned), FIELD, bent, x, stream(4), State()):
        assert_close((tuned.weight.grad, tuned.bias.grad), expected)
        tuned.zero_grad()
        passes += 1
    assert passes == 3


def tail(x: Tensor) -> Tensor:
    """Not 0 for three of the six samples of `bent_iteration`."""
    return torch.relu(bent(x) - 0.1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_pool_of_all_samples_changes_nothing(solver: str) -> None:
    settings: dict[str, Any] = {"solver": solver, "num_inference_steps": 5, "beta": 0.7, "loss_clip": 3.0}
    whole, parts = Corrected(), Corrected()
    (theirs,) = bent_iteration(AdjointMatching(**settings), whole, reward=tail)
    (ours,) = bent_iteration(AdjointMatching(**settings, pool={}), parts, reward=tail, micro_batch_size=4)
    assert ours == pytest.approx(theirs)
    assert_close((parts.weight.grad, parts.bias.grad), (whole.weight.grad, whole.bias.grad), rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_pool_has_that_of_the_whole_batch_as_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all choices of two of the three samples in the tail and one of the other three, which are equally likely
    (`test_utility_estimation.py::test_every_sample_of_a_stratum_is_as_likely_to_be_kept`). Fewer adjoints are run."""
    method, whole, part = AdjointMatching(num_inference_steps=5, num_passes=2), Corrected(), Corrected()
    expected = bent_iteration(method, whole, reward=tail)[0]
    found, tails = [], set()
    for pair, one in itertools.product(itertools.combinations(range(3), 2), range(3)):

        def chosen(inside: Tensor, *, pair: tuple[int, int] = pair, one: int = one, **counts: Any) -> Pool:
            tails.add(int(inside.sum()))
            which = torch.cat([inside.nonzero()[list(pair), 0], (~inside).nonzero()[[one], 0]])
            return Pool(which, torch.tensor([0.25, 0.25, 0.5]))

        monkeypatch.setattr("tiltflow.methods.adjoint_matching.strata", chosen)
        pooled = method.model_copy(update={"pool": TailPool(tail=2, body=1)})
        found.append(bent_iteration(pooled, part, reward=tail)[0])  # its gradients add up
    assert tails == {3}
    assert_close((part.weight.grad / 9, part.bias.grad / 9), (whole.weight.grad, whole.bias.grad), rtol=1e-10, atol=1e-12)
    for key in ("reward", "loss", "path_kl"):
        assert sum(each[key] for each in found) / 9 == pytest.approx(expected[key])
    assert found[0]["reward"] != pytest.approx(expected["reward"])


def test_a_pool_without_a_tail_is_all_body() -> None:
    """Without a gradient of the reward the control goes back to the base's."""
    tuned, again = Corrected(), Corrected()
    (measured,) = bent_iteration(AdjointMatching(num_inference_steps=5, pool={"body": 6}), tuned, reward=lambda x: 0 * bent(x))
    (expected,) = bent_iteration(AdjointMatching(num_inference_steps=5), again, reward=lambda x: 0 * bent(x))
    assert measured == pytest.approx(expected)
    assert_close((tuned.weight.grad, tuned.bias.grad), (again.weight.grad, again.bias.grad), rtol=1e-12, atol=1e-12)


def test_samples_that_are_left_out_leave_the_weights_of_a_pool_a_mean() -> None:
    """One reward of the tail is NaN: the mean is over the other five samples, of which all are kept."""

    def broken(x: Tensor) -> Tensor:
        value = tail(x)
        return torch.where(value == value.max(), torch.nan, value)

    ours, theirs = Corrected(), Corrected()
    (measured,) = bent_iteration(AdjointMatching(num_inference_steps=5, pool={}), ours, reward=broken, non_finite="drop")
    (expected,) = bent_iteration(AdjointMatching(num_inference_steps=5), theirs, reward=broken, non_finite="drop")
    assert measured == pytest.approx(expected)
    assert measured["dropped"] == 1
    assert_close((ours.weight.grad, ours.bias.grad), (theirs.weight.grad, theirs.bias.grad), rtol=1e-12, atol=1e-12)


def test_reward_may_be_taken_at_the_denoised_state() -> None:
    method = AdjointMatching(solver="memoryless-offset", num_inference_steps=5, reward_at="denoised")
    (measured,) = bent_iteration(method, Corrected())
    path = rollout(method.chain(), Corrected(), torch.randn(6, 2, generator=stream(3)), stream(4))
    end = path.states[4] + 0.2 * MIXTURE.velocity(path.states[4], torch.tensor(0.8))
    assert measured["reward"] == pytest.approx(bent(end).mean().item())


# ---- which steps are regressed ----


def regressed(method: AdjointMatching, batch: int = 6) -> list[Tensor]:
    """For each pass, how often (step, sample) was regressed on, [steps, batch]: found by the states that the network saw."""
    tuned = Corrected()
    chain, passes = method.chain(), []
    x = torch.randn(batch, 2, generator=stream(3))
    path = rollout(chain, tuned, x, stream(4))
    for _ in iterate(method, FunctionField(tuned), FIELD, bent, x, stream(4), State()):
        count = torch.zeros(len(chain), batch)
        for seen, time in tuned.asked:
            if time.ndim:
                for state, t in zip(seen, time, strict=True):
                    k = int((t == chain.times).nonzero())
                    count[k, int((path.states[k] == state).all(1).nonzero())] += 1
        passes.append(count)
        tuned.asked.clear()
    return passes


def test_all_controlled_steps_are_regressed_once_by_default() -> None:
    (count,) = regressed(AdjointMatching(num_inference_steps=5))
    assert torch.equal(count, torch.tensor([1.0, 1, 1, 1, 0])[:, None].expand(5, 6))
    (count,) = regressed(AdjointMatching(num_inference_steps=5, solver="memoryless-offset"))
    assert torch.equal(count, torch.ones(5, 6))


@pytest.mark.parametrize("share", [False, True])
def test_strata_choose_their_number_of_different_steps(share: bool) -> None:
    """Anew in each pass, for each sample unless shared, every step of a stratum equally often."""
    strata = (Stratum(start=0.1, end=0.6, count=2), Stratum(start=0.6, count=3))
    passes = regressed(AdjointMatching(num_inference_steps=10, train_timesteps=strata, share_timesteps=share, num_passes=60))
    for count in passes:
        assert count.max() == 1
        assert count[0].sum() == 0
        assert (count[1:6].sum(0) == 2).all()
        assert (count[6:9].sum(0) == 3).all()  # step 9 has no noise
        assert bool((count == count[:, :1]).all()) == share
    draws = 60 * (1 if share else 6)
    often = torch.stack(passes).sum(0)[1:6]
    often = often[:, 0] if share else often.sum(1)
    z = (often - draws * 2 / 5) / (draws * 2 / 5 * 3 / 5) ** 0.5
    assert z.abs().max() < 4


def test_steps_can_be_shared_by_groups_of_samples() -> None:
    """The preset draws them anew for each five pictures, as the authors' code does for each batch that it accumulates."""
    method = AdjointMatching(preset="official-code", num_inference_steps=20, num_passes=10)
    agreed = 0
    for count in regressed(method, batch=12):
        assert (count[:12].sum(0) == 2).all()
        assert (count[12:].sum(0) == 2).all()
        groups = count.split(5, 1)
        assert [group.shape[1] for group in groups] == [5, 5, 2]
        for group in groups:
            assert (group == group[:, :1]).all()
        agreed += int(torch.equal(groups[0][:, 0], groups[1][:, 0]))
    assert agreed < 3  # one in 66 x 21


def test_steps_outside_the_strata_cost_nothing_and_change_nothing() -> None:
    """The adjoint stops at the first step that is regressed on; the gradient of the steps that stay is the same."""
    some = AdjointMatching(num_inference_steps=9, train_timesteps=(Stratum(start=0.5, count=9),))
    everything = AdjointMatching(num_inference_steps=9)
    asked: list[Tensor] = []

    def base(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return affine.velocity(x, t)

    gradients = []
    for method in (some, everything):
        tuned = Controlled(method.chain(), torch.full((9,), 0.1), torch.full((9,), -0.2))
        x = torch.randn(8, 1, generator=stream(1))
        for _ in iterate(method, FunctionField(tuned), FunctionField(base), quadratic_reward(), x, stream(2), State()):
            gradients.append(tuned.slope.grad)
    assert_close(gradients[0][4:], gradients[1][4:])
    assert not gradients[0][:4].any()
    assert len(asked) == 5 + 9


# ---- unbiasedness ----


def gradient_z(pairing: str) -> Tensor:
    """z-scores of the gradient at the optimal control of the quadratic reward, from independent batches."""
    method = AdjointMatching(num_inference_steps=6, pairing=pairing)
    chain = method.chain()
    tuned, gradients = Controlled(chain, *riccati(on_gaussian(chain))), []
    for seed in range(25):
        tuned.zero_grad()
        one_iteration(method, tuned, quadratic_reward(), batch=400, seed=seed)
        gradients.append(torch.cat([tuned.slope.grad[:5], tuned.shift.grad[:5]]))
    sample = torch.stack(gradients)
    return sample.mean(0) / (sample.std(0) / 5)


def test_gradient_at_the_optimum_is_zero_on_average() -> None:
    assert gradient_z("after").abs().max() < 4
    assert gradient_z("before").abs().max() > 20


def test_target_is_unbiased_on_a_mixture(generator: torch.Generator) -> None:
    """E[(w + s a) phi(X_k)] = 0 under the tilted process, w the control of the exact tilted velocity.

    Up to t = 0.7, where what the continuous optimum is off the discrete one, of order h, drowns in the noise of a.
    """
    base = GaussianMixture(torch.tensor([0.6, 0.4]).log(), torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), torch.tensor([0.15, 0.3]))
    reward = QuadraticReward(torch.tensor([0.8, -0.5]), 0.7)
    target, chain, n = base.tilt(reward, 1.0), memoryless(time_grid(60)), 3000
    path = rollout(chain, target.velocity, torch.randn(n, 2, generator=generator), generator)
    adjoint = lean_adjoint(chain, FunctionField(base.velocity), path.states, Objective(reward), 1.0)
    for k in (3, 12, 24, 42):
        x = path.states[k]
        control = chain.control_scale[k] * (path.velocities[k] - adjoint.base_velocities[k])
        residual = control + chain.std[k] * adjoint.targets[k]
        features = torch.stack([torch.ones(n), x[:, 0], x[:, 1], torch.tanh(2 * x[:, 0])], 1)
        products = residual[:, :, None] * features[:, None, :]
        z = products.mean(0) / (products.std(0) / n**0.5)
        assert z.abs().max() < 4


# ---- settings ----


def test_paper_preset_has_the_published_numbers() -> None:
    """Appendix G of arXiv 2409.08861."""
    method = AdjointMatching(preset="paper")
    assert (method.solver, method.num_inference_steps, method.pairing, method.reward_at) == (
        "memoryless-offset",
        40,
        "right",
        "denoised",
    )
    assert method.train_timesteps == (Stratum(start=0, end=0.75, count=10), Stratum(start=0.75, end=1, count=10))
    assert (method.loss_clip, method.drop_quantile) == (1.6, None)
    optimizer = fill_optimizer(method)
    assert (optimizer.learning_rate, optimizer.adam_beta1, optimizer.adam_beta2) == (2e-5, 0.95, 0.999)
    assert (optimizer.adam_weight_decay, optimizer.max_grad_norm, optimizer.lr_warmup_steps) == (1e-2, 1.0, 0)


def test_official_code_preset_has_the_published_numbers() -> None:
    """microsoft/soc-fine-tuning-sd."""
    method = AdjointMatching(preset="official-code")
    assert (method.solver, method.pairing, method.reward_at) == ("ddim-half-way", "before-diffusion", "end")
    assert method.num_inference_steps == 50
    assert method.train_timesteps == (Stratum(start=0, end=0.6, count=2), Stratum(start=0.6, end=1, count=2))
    assert method.share_timesteps == 5  # the batches of 5 pictures that they accumulate 25 of
    assert (method.loss_clip, method.drop_quantile) == (None, 0.9)
    optimizer = fill_optimizer(method)
    assert (optimizer.learning_rate, optimizer.adam_beta1, optimizer.adam_beta2) == (3e-6, 0.9, 0.95)
    assert (optimizer.adam_weight_decay, optimizer.max_grad_norm, optimizer.lr_warmup_steps) == (0, None, 20)
    assert optimizer.lr_warmup_from_zero  # their first step is at rate 0


@pytest.mark.parametrize("preset", ["paper", "official-code"])
@pytest.mark.parametrize("start", [0.0, 0.06])
def test_presets_run(preset: str, start: float) -> None:
    method, tuned = AdjointMatching(preset=preset, num_inference_steps=20), Corrected()
    (measured,) = bent_iteration(method, tuned, start=start)
    assert all(torch.tensor(value).isfinite() for value in measured.values())
    assert tuned.weight.grad.isfinite().all()


def test_keys_beside_a_preset_win() -> None:
    method = AdjointMatching(preset="paper", loss_clip=None)
    assert (method.loss_clip, method.solver) == (None, "memoryless-offset")
    optimizer = fill_optimizer(method, Optimizer(learning_rate=1e-3))
    assert (optimizer.learning_rate, optimizer.adam_beta1) == (1e-3, 0.95)
    assert AdjointMatching() == AdjointMatching(preset=None)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"pairing": "right"}, "needs solver 'memoryless-offset'"),
        ({"preset": "paper", "solver": "memoryless"}, "needs solver 'memoryless-offset'"),
        ({"preset": "paper", "shift": 3.0}, "shift 1"),
        ({"preset": "paper", "spacing": "middle"}, "even steps"),
        ({"preset": "papper"}, "'paper' or 'official-code'"),
        (
            {"solver": "euler"},
            "a memoryless solver .*ddpm, euler-maruyama, flow-sde, memoryless, memoryless-offset.*, is 'euler'",
        ),
        ({"beta": 0.0}, "greater than 0"),
        ({"num_inference_steps": 1}, "greater than or equal to 2"),
        ({"pool": {}, "drop_quantile": 0.9}, "drop_quantile counts all samples alike"),
        ({"pool": {}, "control_from": 0.5}, "control_from with self-distillation counts all samples alike"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        AdjointMatching(**settings)


def test_rewards_that_make_no_sense_are_refused() -> None:
    method = AdjointMatching(num_inference_steps=3)
    with pytest.raises(InputError, match="no gradient"):
        one_iteration(method, Controlled(method.chain()), lambda x: (x[:, 0] > 0).double())
    with pytest.raises(NonFiniteError, match="not finite for 8 of 8"):
        one_iteration(method, Controlled(method.chain()), lambda x: x[:, 0] * torch.nan)
