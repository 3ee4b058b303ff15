"""The lean adjoint: against products of gains, the continuous limit, autograd through the chain and its printed recursion."""

from __future__ import annotations

from collections.abc import Callable

import affine
import pytest
import torch
from affine import on_gaussian
from torch import Tensor
from torch.testing import assert_close

from tiltflow.control.adjoint import LeanAdjoint, lean_adjoint
from tiltflow.control.objective import Objective
from tiltflow.errors import InputError, NonFiniteError
from tiltflow.flows.field import FunctionField
from tiltflow.laws.gaussian_mixture import QuadraticReward
from tiltflow.problems.mixture import Mixture
from tiltflow.samplers.chain import Chain, sde, step
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.rollout import rollout
from tiltflow.samplers.solvers.ddim import ddim
from tiltflow.samplers.solvers.euler import euler
from tiltflow.samplers.solvers.memoryless import memoryless
from tiltflow.samplers.solvers.memoryless_offset import memoryless_offset

pytestmark = pytest.mark.usefixtures("double")

MIXTURE = Mixture(modes=3, radius=1.5, scale=0.5).base()
FIELD = FunctionField(MIXTURE.velocity)


def noisy_to_the_end(times: Tensor) -> Chain:
    return memoryless(times, denoise=False)


def ddpm(times: Tensor) -> Chain:
    return ddim(times, eta=1.0)


CHAINS = [memoryless, noisy_to_the_end, memoryless_offset, ddpm, euler]
over_chains = pytest.mark.parametrize("make", CHAINS)


def bent(x: Tensor) -> Tensor:
    """A reward with a gradient that is not affine."""
    return torch.sin(2 * x[:, 0]) - x[:, 1] ** 4 / 4 + x[:, 0] * x[:, 1]


def bent_gradient(x: Tensor) -> Tensor:
    return torch.stack([2 * torch.cos(2 * x[:, 0]) + x[:, 1], -(x[:, 1] ** 3) + x[:, 0]], 1)


def on_the_gaussian(chain: Chain, reward: Callable[[Tensor], Tensor], beta: float = 1.0, **options: object) -> LeanAdjoint:
    """Along the trajectory without noise from 0."""
    states = [torch.zeros(1, 1)]
    for k in range(len(chain)):
        states.append(chain.mean(k, states[k], affine.velocity(states[k], chain.times[k])))
    return lean_adjoint(chain, FunctionField(affine.velocity), states, Objective(reward), beta, **options)


def path_on_mixture(chain: Chain, generator: torch.Generator, batch: int = 4) -> list[Tensor]:
    return rollout(chain, MIXTURE.velocity, torch.randn(batch, 2, generator=generator), generator).states


# ---- on a Gaussian ----


@over_chains
def test_gaussian_adjoint_is_the_product_of_the_gains(make: Callable[[Tensor], Chain]) -> None:
    """r = c x: a_{k+1} = -c / beta times the gains of the steps after k, whatever the trajectory."""
    chain = make(time_grid(12))
    gain = on_gaussian(chain).gain
    result = on_the_gaussian(chain, QuadraticReward(torch.tensor([1.7])), beta=0.5)
    expected = torch.stack([-1.7 / 0.5 * gain[k + 1 :].prod() for k in range(12)])
    assert_close(torch.cat(result.targets).flatten(), expected)


def test_gaussian_adjoint_converges_to_the_propagator() -> None:
    """a(t) = -c Phi(t), Phi = t s^2 / Var_t, at order h (memoryless noise)."""
    errors = []
    for steps in (50, 100):
        chain = memoryless(time_grid(steps))
        targets = torch.cat(on_the_gaussian(chain, QuadraticReward(torch.tensor([1.7]))).targets).flatten()
        t = chain.times[1:]
        phi = t * affine.VARIANCE / (t**2 * affine.VARIANCE + (1 - t) ** 2)
        errors.append((targets + 1.7 * phi).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(("sigma", "shift"), [(0.0, 0.0), (0.2, 0.050188), (0.5, 0.231226), (1.0, 0.406634), (2.0, 0.424999)])
def test_wrong_noise_level_leaves_the_value_function_bias(sigma: float, shift: float) -> None:
    """r = c x: the controls -s_k a_{k+1} move the mean by c Var(X_K | X_0), and c Var(X_1) = 0.425 would be right."""

    def chain(steps: int) -> Chain:
        return sde(time_grid(steps), lambda t: torch.full_like(t, sigma))

    def forecast(steps: int) -> float:
        return 1.7 * on_gaussian(chain(steps)).law(0.0, 0.0)[1].item()

    base = on_gaussian(chain(30))
    a = torch.cat(on_the_gaussian(chain(30), QuadraticReward(torch.tensor([1.7]))).targets).flatten()
    mean, variance = base.controlled(torch.zeros(30), -base.std * a).law()
    assert mean.item() - base.law()[0].item() == pytest.approx(forecast(30), abs=1e-12)
    assert variance == base.law()[1]
    # two rounds of Richardson: the error left is of order h^3
    first, second = 2 * forecast(400) - forecast(200), 2 * forecast(800) - forecast(400)
    assert (4 * second - first) / 3 == pytest.approx(shift, abs=1e-6)


# ---- on a mixture ----


@over_chains
def test_adjoint_is_autograd_through_the_base_chain(make: Callable[[Tensor], Chain], generator: torch.Generator) -> None:
    """a_k is the gradient of -r(x_K) / beta in x_k with the noise held fixed; `first` only shortens the way back."""
    chain = make(time_grid(7))
    states = path_on_mixture(chain, generator)
    noise = [
        states[k + 1] - chain.mean(k, states[k], MIXTURE.velocity(states[k], chain.times[k])) for k in range(len(states) - 1)
    ]
    whole = lean_adjoint(chain, FIELD, states, Objective(bent), 0.5)
    for k in range(6):
        start = x = states[k + 1].clone().requires_grad_()
        for j in range(k + 1, 7):
            x = chain.mean(j, x, MIXTURE.velocity(x, chain.times[j])) + (noise[j] if j < len(noise) else 0)
        (gradient,) = torch.autograd.grad(-bent(x).sum() / 0.5, start)
        assert_close(whole.targets[k], gradient)
        part = lean_adjoint(chain, FIELD, states, Objective(bent), 0.5, first=k)
        assert part.targets[:k] == [None] * k
        assert torch.equal(part.targets[k], whole.targets[k])
    assert_close(whole.end, x)
    assert_close(whole.rewards, bent(x))


@over_chains
@pytest.mark.parametrize("pairing", ["after", "before"])
@pytest.mark.parametrize("first", [0, 3, 6])
def test_base_velocities_are_those_along_the_path(
    make: Callable[[Tensor], Chain], pairing: str, first: int, generator: torch.Generator
) -> None:
    chain, asked = make(time_grid(7)), []

    def base(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.item())
        return MIXTURE.velocity(x, t)

    states = path_on_mixture(chain, generator)
    result = lean_adjoint(chain, FunctionField(base), states, Objective(bent), 1.0, pairing=pairing, first=first)
    assert sorted(asked) == chain.times[first:-1].tolist()  # each step once
    for k in range(7):
        v = result.base_velocities[k]
        if k < first and k < 6:
            assert v is None
        else:
            assert torch.equal(v, MIXTURE.velocity(states[k], chain.times[k]))
            assert not v.requires_grad


def jacobian_product(f: Callable[[Tensor], Tensor], x: Tensor, a: Tensor) -> Tensor:
    """J^T a by the full Jacobian, sample by sample."""
    return torch.stack(
        [torch.autograd.functional.jacobian(lambda y: f(y[None])[0], xi).T @ ai for xi, ai in zip(x, a, strict=True)]
    )


@over_chains
def test_pairing_before_is_one_jacobian_further(make: Callable[[Tensor], Chain], generator: torch.Generator) -> None:
    chain = make(time_grid(7))
    states = path_on_mixture(chain, generator)
    after = lean_adjoint(chain, FIELD, states, Objective(bent), 0.5).targets
    before = lean_adjoint(chain, FIELD, states, Objective(bent), 0.5, pairing="before").targets
    for k in range(7):
        mean = lambda x, k=k: chain.mean(k, x, MIXTURE.velocity(x, chain.times[k]))  # noqa: E731
        assert_close(before[k], jacobian_product(mean, states[k], after[k]))


def test_pairing_right_is_the_printed_recursion(generator: torch.Generator) -> None:
    """2409.08861, eq. 41: a_{t-h} = a_t + h a_t^T grad(2 v(X_t, t) - kappa_t X_t), t = 1, .., h, kappa = 1 / (t + h)."""
    chain, h = memoryless_offset(time_grid(8)), 1 / 8
    states = path_on_mixture(chain, generator)
    right = memoryless_offset(time_grid(8) + h)
    result = lean_adjoint(chain, FIELD, states, Objective(bent), 0.5, pairing="right", reward_at="denoised", right=right)
    end = states[7] + h * MIXTURE.velocity(states[7], torch.tensor(1 - h))
    assert_close(result.end, end)
    assert_close(result.rewards, bent(end))
    a = -bent_gradient(end) / 0.5
    for k in range(7, -1, -1):
        t = torch.tensor((k + 1) * h)
        drift = lambda x, t=t: 2 * MIXTURE.velocity(x, t) - x / (t + h)  # noqa: E731
        a = a + h * jacobian_product(drift, states[k + 1], a)
        assert_close(result.targets[k], a)
        assert_close(result.base_velocities[k], MIXTURE.velocity(states[k], torch.tensor(k * h)))


@pytest.mark.parametrize("first", [3, 7])
def test_pairing_right_stops_at_the_first_step_asked_for(first: int, generator: torch.Generator) -> None:
    chain = memoryless_offset(time_grid(8))
    states = path_on_mixture(chain, generator)
    right = memoryless_offset(time_grid(8) + 1 / 8)
    whole = lean_adjoint(chain, FIELD, states, Objective(bent), 1.0, pairing="right", right=right)
    part = lean_adjoint(chain, FIELD, states, Objective(bent), 1.0, pairing="right", right=right, first=first)
    assert part.targets[:first] == [None] * first
    assert_close(part.targets[first:], whole.targets[first:], rtol=0, atol=0)
    assert_close(part.base_velocities[first:], whole.base_velocities[first:])


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("pairing", ["after", "before", "right"])
def test_steps_are_handed_on_once_each_and_at_no_more_calls(pairing: str, first: int, generator: torch.Generator) -> None:
    chain, calls = memoryless_offset(time_grid(8)), []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return MIXTURE.velocity(x, t)

    states = path_on_mixture(chain, generator)
    right = memoryless_offset(time_grid(8) + 1 / 8) if pairing == "right" else None
    handed: dict[int, tuple[Tensor, Tensor]] = {}

    def taken(k: int, target: Tensor, v_base: Tensor) -> None:
        assert k not in handed
        handed[k] = target, v_base

    options = {"pairing": pairing, "right": right, "first": first}
    kept = lean_adjoint(chain, FunctionField(velocity), states, Objective(bent), 1.0, **options)
    count = len(calls)
    result = lean_adjoint(chain, FunctionField(velocity), states, Objective(bent), 1.0, taken=taken, **options)
    assert len(calls) == 2 * count
    assert sorted(handed) == [*range(first, 8)]
    for k, pair in handed.items():
        assert_close(pair, (kept.targets[k], kept.base_velocities[k]), rtol=0, atol=0)
    assert result.targets == result.base_velocities == [None] * 8


# ---- a running reward ----


def turning(x: Tensor, t: Tensor) -> Tensor:
    """A running reward whose gradient is not affine, and changes with time."""
    return torch.cos(3 * x[:, 0] + 2 * t) * x[:, 1] - t * x[:, 0] ** 4


@over_chains
@pytest.mark.parametrize("pairing", ["after", "before"])
def test_a_running_reward_is_a_source_of_the_adjoint(
    make: Callable[[Tensor], Chain], pairing: str, generator: torch.Generator
) -> None:
    """a_k is the gradient in x_k of -(sum_{j >= k} h_j f(x_j, t_j) + r(x_K)) / beta with the noise held fixed."""
    chain = make(time_grid(7, shift=2.0))
    states, h = path_on_mixture(chain, generator), chain.times.diff()
    noise = [
        states[k + 1] - chain.mean(k, states[k], MIXTURE.velocity(states[k], chain.times[k])) for k in range(len(states) - 1)
    ]
    whole = lean_adjoint(chain, FIELD, states, Objective(bent, turning), 0.5, pairing=pairing)
    for k in range(6):
        step = k + (pairing == "after")
        start = x = states[step].clone().requires_grad_()
        total = torch.zeros(len(x))
        for j in range(step, 7):
            total = total + h[j] * turning(x, chain.times[j])
            x = chain.mean(j, x, MIXTURE.velocity(x, chain.times[j])) + (noise[j] if j < len(noise) else 0)
        (gradient,) = torch.autograd.grad(-(total + bent(x)).sum() / 0.5, start)
        assert_close(whole.targets[k], gradient)
    assert_close(whole.rewards, bent(x))  # of the end alone


def test_pairing_right_takes_the_running_reward_where_it_takes_the_jacobian(generator: torch.Generator) -> None:
    """a_{t-h} = a_t + h (a_t^T grad b(X_t, t) - grad f(X_t, t) / beta)."""
    chain, h = memoryless_offset(time_grid(8)), 1 / 8
    states = path_on_mixture(chain, generator)
    options = {"pairing": "right", "right": memoryless_offset(time_grid(8) + h)}
    found = lean_adjoint(chain, FIELD, states, Objective(bent, turning), 0.5, **options).targets
    a = -bent_gradient(states[8]) / 0.5
    for k in range(7, -1, -1):
        t = torch.tensor((k + 1) * h)
        drift = lambda x, t=t: 2 * MIXTURE.velocity(x, t) - x / (t + h)  # noqa: E731
        y = states[k + 1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(turning(y, t).sum(), y)
        a = a + h * jacobian_product(drift, states[k + 1], a) - h * slope / 0.5
        assert_close(found[k], a)


# ---- the end ----


@pytest.mark.parametrize("make", [noisy_to_the_end, memoryless_offset])
def test_reward_gradient_is_taken_where_asked(make: Callable[[Tensor], Chain], generator: torch.Generator) -> None:
    """Behind a noisy last step: at the noisy state, or at the denoised one x + (1 - t) v."""
    chain = make(time_grid(5))
    states = path_on_mixture(chain, generator)
    denoised = states[4] + 0.2 * MIXTURE.velocity(states[4], torch.tensor(0.8))
    for where, end in (("end", states[5]), ("denoised", denoised)):
        result = lean_adjoint(chain, FIELD, states, Objective(bent), 0.5, reward_at=where)
        assert_close(result.end, end)
        assert_close(result.rewards, bent(end))
        assert_close(result.targets[4], -bent_gradient(end) / 0.5)


def test_noiseless_last_step_is_taken_by_the_base(generator: torch.Generator) -> None:
    chain = memoryless(time_grid(5))
    states = path_on_mixture(chain, generator)
    assert len(states) == 5
    result = lean_adjoint(chain, FIELD, states, Objective(bent), 1.0)
    assert_close(result.end, states[4] + 0.2 * MIXTURE.velocity(states[4], torch.tensor(0.8)))


@over_chains
def test_a_small_move_against_the_adjoint_raises_the_reward(
    make: Callable[[Tensor], Chain], generator: torch.Generator
) -> None:
    """By |a|^2 beta for each unit moved, to first order, at every step."""
    chain, beta, size = make(time_grid(6)), 0.5, 1e-5
    x = torch.randn(4, 2, generator=generator)
    states = [x]
    for k in range(6):  # along the mean: no noise, so that the way forward can be walked again
        states.append(chain.mean(k, states[k], MIXTURE.velocity(states[k], chain.times[k])))
    result = lean_adjoint(chain, FIELD, states, Objective(bent), beta)
    for k in range(6):
        a = result.targets[k]
        moved = states[k + 1] - size * a
        for j in range(k + 1, 6):
            moved = chain.mean(j, moved, MIXTURE.velocity(moved, chain.times[j]))
        gain = (bent(moved) - bent(states[6])) / size
        assert (gain > 0).all()
        assert_close(gain, beta * a.square().sum(1), rtol=1e-2, atol=1e-4)  # finite difference: error of order `size`


# ---- rewards that cannot be used ----


def test_rewards_without_a_usable_gradient_are_refused(generator: torch.Generator) -> None:
    chain = memoryless(time_grid(4))
    states = path_on_mixture(chain, generator, batch=2)

    def attempt(reward: Callable[[Tensor], Tensor]) -> None:
        lean_adjoint(chain, FIELD, states, Objective(reward), 1.0)

    with pytest.raises(InputError, match="no gradient"):
        attempt(lambda x: x.detach().sum(1))
    with pytest.raises(InputError, match=r"shape \[2\], got \[2, 2\]"):
        attempt(lambda x: x)
    with pytest.raises(InputError, match="floats, got int64"):
        attempt(lambda x: x.sum(1).long())
    with pytest.raises(InputError, match="must return a tensor, got float"):
        attempt(lambda x: 1.0)
    with pytest.raises(NonFiniteError, match="not finite for 1 of 2"):
        attempt(lambda x: x.sum(1) * torch.tensor([1, torch.nan]))
    with pytest.raises(NonFiniteError, match="gradient of the reward"):
        attempt(lambda x: (x * 0).abs().sqrt().sum(1))


def test_adjoint_does_not_touch_the_graph_of_its_input(generator: torch.Generator) -> None:
    chain = memoryless(time_grid(4))
    states = path_on_mixture(chain, generator)
    with torch.no_grad():
        result = lean_adjoint(chain, FIELD, states, Objective(bent), 1.0)
    assert not any(target.requires_grad for target in result.targets)
    assert not any(state.requires_grad for state in states)


def test_step_and_mean_agree_without_noise() -> None:
    chain = euler(time_grid(4))
    x = torch.ones(1, 2)
    assert torch.equal(step(chain, 1, x, 2 * x, torch.Generator()), chain.mean(1, x, 2 * x))
