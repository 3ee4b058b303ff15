"""A running reward: linear-quadratic chains, whose optimal control is Riccati's; nothing changes without one."""

from __future__ import annotations

from typing import Any

import affine
import pytest
import torch
from affine import Affine, Controlled, on_gaussian, riccati
from tiny import iterate
from torch import Tensor
from torch.testing import assert_close

import tiltflow
from tiltflow.control.objective import Objective
from tiltflow.errors import InputError, UserCodeError
from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import time_grid
from tiltflow.streams import stream

BETA, STEPS = 0.8, 8
TERMINAL = {"linear": (1.7, 0.0), "quadratic": (1.7, 3.0)}
BEGUN = 2.5  # of the running reward at t = 0; it changes its sign on the way


def running(x: Tensor, t: Tensor) -> Tensor:
    """2.5 (1 - 2 t) x - 3 (1 + t) x^2 / 2"""
    return BEGUN * (1 - 2 * t) * x[:, 0] - 3 * (1 + t) * x[:, 0].square() / 2


def costs(chain: Chain) -> tuple[Tensor, Tensor]:
    """(Q, q) of the running reward, as costs of the steps over beta."""
    t, h = chain.times[:-1], chain.times.diff()
    return 3 * h * (1 + t) / BETA, -h * BEGUN * (1 - 2 * t) / BETA


def optimum(chain: Chain, kind: str, *, with_running: bool = True) -> tuple[Tensor, Tensor]:
    linear, quadratic = (each / BETA for each in TERMINAL[kind])
    return riccati(on_gaussian(chain), linear, quadratic, costs(chain) if with_running else None)


def reward(kind: str) -> Any:
    linear, quadratic = TERMINAL[kind]
    return lambda x: linear * x[:, 0] - quadratic * x[:, 0].square() / 2


def value(chain: Chain, controls: tuple[Tensor, Tensor], kind: str) -> Tensor:
    """E[sum_k h_k f + r] / beta - path KL, from the moments of the controlled chain."""
    base, (Q, q), (linear, quadratic) = on_gaussian(chain), costs(chain), TERMINAL[kind]
    tuned, total = base.controlled(*controls), -base.path_kl(*controls)
    for k in range(len(chain)):
        mean, variance = Affine(tuned.gain[:k], tuned.offset[:k], tuned.std[:k]).law()
        total = total - Q[k] * (mean**2 + variance) / 2 - q[k] * mean
    mean, variance = tuned.law()
    return total + (linear * mean - quadratic * (mean**2 + variance) / 2) / BETA


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", TERMINAL)
def test_riccati_is_the_optimum_of_the_objective(kind: str) -> None:
    """The yardstick of this file: the objective by moments has no gradient there, and one elsewhere."""
    chain = tiltflow.AdjointMatching(num_inference_steps=STEPS).chain()
    for with_running in (True, False):
        controls = tuple(each.requires_grad_() for each in optimum(chain, kind, with_running=with_running))
        gradients = torch.autograd.grad(value(chain, controls, kind), controls)
        assert (max(each.abs().max() for each in gradients) < 1e-12) == with_running


def z_scores(method: Any, controls: tuple[Tensor, Tensor], kind: str, seeds: int = 30) -> Tensor:
    """The mean over batches of the gradient in the controls, in standard errors."""
    found, chain = [], method.sampling.chain()
    for seed in range(seeds):
        tuned = Controlled(chain, *controls)
        x = torch.randn(400, 1, generator=stream(seed, "start"))
        fields = FunctionField(tuned), FunctionField(Controlled(chain))
        state = method.new_state((1,), 0, torch.device("cpu"))
        next(iterate(method, *fields, reward(kind), x, stream(seed, "noise"), state, running=running))
        moved = chain.std > 0
        found.append(torch.cat([tuned.slope.grad[moved], tuned.shift.grad[moved]]))
    gradients = torch.stack(found)
    return gradients.mean(0) / gradients.std(0) * seeds**0.5


METHODS = {
    "adjoint-matching": tiltflow.AdjointMatching(beta=BETA, num_inference_steps=STEPS),
    "bootstrapped": tiltflow.AdjointMatching(beta=BETA, num_inference_steps=STEPS, bootstrap=1.0),
    "ddpm": tiltflow.AdjointMatching(beta=BETA, num_inference_steps=STEPS, solver="ddpm", shift=1.5),
    # the price of the chain's own transitions, of which Riccati's control is the optimum
    "return": tiltflow.ScoreAsAction(
        beta=BETA, num_inference_steps=STEPS, estimator="return", running_reward="transition-kl", num_passes=1
    ),
    "return-minus-value": tiltflow.ScoreAsAction(
        beta=BETA,
        num_inference_steps=STEPS,
        estimator="return-minus-value",
        running_reward="transition-kl",
        num_passes=1,
        critic={"num_steps": 0},
    ),
}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("kind", TERMINAL)
@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_vanishes_at_the_optimal_control_alone(name: str, kind: str) -> None:
    method: Any = METHODS[name]
    chain = method.sampling.chain()
    assert z_scores(method, optimum(chain, kind), kind).abs().max() < 4
    assert z_scores(method, optimum(chain, kind, with_running=False), kind).abs().max() > 6


@pytest.mark.usefixtures("double")
def test_the_pathwise_gradient_has_the_running_reward_of_the_last_step() -> None:
    """Two steps, the last one the base's own: vec_0 is the gradient of r(m_1(x_1)) + h_1 f(x_1, t_1)."""
    method = tiltflow.ScoreAsAction(beta=BETA, num_inference_steps=2, estimator="pathwise", num_passes=1)
    chain, base = method.sampling.chain(), FunctionField(affine.velocity)
    tuned, x = Controlled(chain), torch.randn(16, 1, generator=stream(0, "start"))
    (measured,) = iterate(
        method,
        FunctionField(tuned),
        base,
        reward("quadratic"),
        x,
        stream(0, "noise"),
        method.new_state((1,), 0, x.device),
        running=running,
    )
    path, end = method.rollout(FunctionField(tuned), base, x, stream(0, "noise"))
    y = path.states[1].clone().requires_grad_()
    last = chain.mean(1, y, affine.velocity(y, chain.times[1]))
    f = chain.times.diff()[1] * running(y, chain.times[1])
    (vector,) = torch.autograd.grad((reward("quadratic")(last) + f).sum(), y)
    assert tuned.shift.grad is not None
    assert tuned.shift.grad[0].item() == pytest.approx(-(vector * chain.std[0]).mean().item() / BETA, rel=1e-9)
    gains = chain.times.diff()[0] * running(x, chain.times[0]) + f
    assert measured["objective"] == pytest.approx((reward("quadratic")(end) + gains).mean().item(), rel=1e-9)


def of_chain(method: tiltflow.AdjointMatching) -> tiltflow.Model:
    return tiltflow.Model(Flow(Controlled(method.chain())), (1,))


@pytest.mark.parametrize("kind", TERMINAL)
def test_training_reaches_the_optimal_gains(kind: str) -> None:
    """Every slope and shift of the controls within 0.03; the running reward moves them by up to 0.14 and more."""
    method = tiltflow.AdjointMatching(beta=BETA, num_inference_steps=STEPS)
    tuned = tiltflow.tune(
        of_chain(method),
        reward(kind),
        method,
        tiltflow.Training(max_train_steps=200, train_batch_size=128),
        optimizer=tiltflow.Optimizer(learning_rate=3e-2, lr_warmup_steps=0, max_grad_norm=None),
        running_reward=running,
    )
    network: Any = tuned.flow.network
    slope, shift = optimum(method.chain(), kind)
    assert_close(network.slope.detach().double(), slope.double(), rtol=0, atol=0.03)
    assert_close(network.shift.detach().double(), shift.double(), rtol=0, atol=0.03)


@pytest.mark.parametrize("method", [METHODS["adjoint-matching"], METHODS["return"]])
def test_a_constant_running_reward_changes_nothing(method: Any) -> None:
    """Bit for bit where the gradient of f is used; else up to rounding, after two steps."""
    model, found = tiltflow.Model(Flow(Controlled(method.sampling.chain())), (1,)), []
    for f in (None, lambda x, t: 0 * x.sum(1) + 3):
        training = tiltflow.Training(max_train_steps=2, train_batch_size=16)
        tuned: Any = tiltflow.tune(model, reward("quadratic"), method, training, running_reward=f)
        found.append(torch.cat([tuned.flow.network.slope, tuned.flow.network.shift]).detach())
    assert found[0].abs().max() > 0
    if isinstance(method, tiltflow.AdjointMatching):
        assert torch.equal(*found)
    assert_close(*found, rtol=1e-3, atol=1e-6)


def test_the_gains_of_a_path_are_the_steps_times_the_running_reward() -> None:
    times = time_grid(3)
    states = [torch.full((2, 1), float(k)) for k in range(4)]
    gains = Objective(reward("linear"), lambda x, t: x[:, 0] + 10 * t).gains(states, times)
    assert_close(gains, torch.tensor([[0.0], [1 + 10 / 3], [2 + 20 / 3]]).expand(3, 2) / 3)
    assert Objective(reward("linear")).gains(states, times) is None


def test_what_cannot_have_a_running_reward_is_refused(tmp_path: Any) -> None:
    method = METHODS["adjoint-matching"]
    model, training = of_chain(method), tiltflow.Training(max_train_steps=1, train_batch_size=4)

    def attempt(method: Any, f: Any = running, **options: Any) -> None:
        tiltflow.tune(model, reward("linear"), method, options.pop("training", training), running_reward=f, **options)

    with pytest.raises(InputError, match="running_reward: method 'orw-cfm-w2' rewards the ends of paths alone"):
        attempt(tiltflow.OrwCfmW2())
    with pytest.raises(InputError, match="running_reward must be a function of"):
        attempt(method, 3)
    with pytest.raises(InputError, match="output: its report compares"):
        attempt(method, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="calibration_samples: the calibration is on"):
        attempt(method, training=tiltflow.Training(max_train_steps=1, train_batch_size=4, calibration_samples=8))
    with pytest.raises(InputError, match=r"running reward must return one number per sample, shape \[4\], got \[4, 1\]"):
        attempt(method, lambda x, t: x)
    with pytest.raises(InputError, match="running reward has no gradient"):
        attempt(method, lambda x, t: x.detach()[:, 0])
    with pytest.raises(UserCodeError, match="the running reward raised ZeroDivisionError"):
        attempt(method, lambda x, t: 1 / 0)
