"""The full adjoint: its gradient is that of back-propagation through the controlled chain, its fixed point that of the lean."""

from __future__ import annotations

import pytest
import torch
from affine import Controlled, on_gaussian, riccati
from test_adjoint_matching import (
    MIXTURE,
    SOLVERS,
    Corrected,
    bent,
    bent_iteration,
    one_iteration,
    quadratic_reward,
    regress,
)
from torch import Tensor
from torch.testing import assert_close

from tiltflow.errors import SettingsError
from tiltflow.flows.field import FunctionField
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.solvers.memoryless import memoryless
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")
BETA = 0.7


def objective(chain: Chain, tuned: Corrected) -> Tensor:
    """The mean of sum_k |w_k|^2 / 2 - r(x_K) / beta, with one graph of all steps; the last one without noise is the base's."""
    x, generator = torch.randn(6, 2, generator=stream(3)), stream(4)
    cost = torch.zeros(6)
    for k in range(len(chain)):
        t = chain.times[k]
        mean = base = chain.x_scale[k] * x + chain.v_scale[k] * MIXTURE.velocity(x, t)
        if chain.std[k] > 0:
            mean = chain.x_scale[k] * x + chain.v_scale[k] * tuned(x, t)
            cost = cost + ((mean - base) / chain.std[k]).square().sum(1) / 2
            mean = mean + chain.std[k] * torch.randn(6, 2, generator=generator, dtype=torch.float32).double()
        x = mean
    return (cost - bent(x) / BETA).mean()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_gradient_is_that_of_back_propagation_through_the_chain(solver: str) -> None:
    """Twice, as the loss has no half. That of the lean adjoint is another one, away from the optimum."""
    method, tuned = AdjointMatching(solver=solver, num_inference_steps=5, shift=2.0, beta=BETA, adjoint="full"), Corrected()
    bent_iteration(method, tuned, start=0.05, micro_batch_size=4)
    whole = torch.autograd.grad(objective(method.chain(0.05), tuned), (tuned.weight, tuned.bias))
    found = tuned.weight.grad, tuned.bias.grad
    assert_close(found, tuple(2 * each for each in whole), rtol=1e-10, atol=1e-12)
    lean = Corrected()
    bent_iteration(method.model_copy(update={"adjoint": "lean"}), lean, start=0.05)
    assert (lean.weight.grad - found[0]).norm() > 0.05 * found[0].norm()


def test_without_control_it_is_the_lean_one() -> None:
    found = []
    for adjoint in ("lean", "full"):
        tuned = Controlled(memoryless(time_grid(9)))
        method = AdjointMatching(num_inference_steps=9, adjoint=adjoint)
        one_iteration(method, tuned, quadratic_reward())
        found.append((tuned.slope.grad, tuned.shift.grad))
    assert_close(*found, rtol=1e-12, atol=1e-12)


def test_the_fixed_point_is_the_optimal_control() -> None:
    """One exact regression from the optimum stays there; from elsewhere the two adjoints go different ways."""
    chain = memoryless(time_grid(20))
    best = riccati(on_gaussian(chain))

    def regressed(controls: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return regress(chain, controls, quadratic_reward(), tuned=FunctionField(Controlled(chain, *controls)))

    assert_close(regressed(best), best, rtol=0, atol=1e-12)
    away = (best[0] + 0.1 * (chain.std > 0), best[1])
    full, lean = regressed(away), regress(chain, away, quadratic_reward())
    assert max((a - b).abs().max() for a, b in zip(full, lean, strict=True)) > 1e-3


def test_at_the_optimum_it_has_less_noise_on_a_gaussian() -> None:
    """What is left of the loss there is noise of the targets."""
    chain, losses = memoryless(time_grid(20)), {}
    for adjoint in ("lean", "full"):
        best = Controlled(chain, *(each.clone() for each in riccati(on_gaussian(chain))))
        method = AdjointMatching(num_inference_steps=20, adjoint=adjoint)
        losses[adjoint] = one_iteration(method, best, quadratic_reward(), batch=1024)[0]["loss"]
    assert losses["lean"] == pytest.approx(0.217, rel=0.1)
    assert losses["full"] == pytest.approx(0.153, rel=0.1)


@pytest.mark.parametrize("settings", [{"pairing": "before"}, {"bootstrap": 0.5}, {"control_from": 0.3}, {"preset": "paper"}])
def test_what_does_not_go_with_it(settings: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="adjoint 'full' is that of the whole chain"):
        AdjointMatching(adjoint="full", **settings)  # type: ignore[arg-type]


def test_the_published_basic_adjoint_of_policies_has_a_temperature_that_grows_with_its_steps() -> None:
    """BAM (2601.14234) descends - c r(x_1) + sum_k 2 |v - v_base|^2 / sigma_k^2, without the size of a step, by
    back-propagation through T steps of the memoryless SDE with an offset: the objective at temperature T / c, times T."""
    steps, c = 6, 4.0
    method, tuned = (
        AdjointMatching(solver="memoryless-offset", num_inference_steps=steps, beta=steps / c, adjoint="full"),
        Corrected(),
    )
    bent_iteration(method, tuned)
    x, generator, h = torch.randn(6, 2, generator=stream(3)), stream(4), 1 / steps
    cost = torch.zeros(6)
    for k in range(steps):
        t = torch.tensor(k * h)
        sigma = (2 * (1 - t + h) / (t + h)).sqrt()
        v = tuned(x, t)
        cost = cost + 2 * ((v - MIXTURE.velocity(x, t)) / sigma).square().sum(1)
        noise = torch.randn(6, 2, generator=generator, dtype=torch.float32).double()
        x = x + h * (2 * v - x / (t + h)) + h**0.5 * sigma * noise
    theirs = torch.autograd.grad((cost - c * bent(x)).mean(), (tuned.weight, tuned.bias))
    assert_close((tuned.weight.grad, tuned.bias.grad), tuple(2 / steps * each for each in theirs), rtol=1e-9, atol=1e-12)
