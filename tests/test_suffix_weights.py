"""Weights for paths of another policy: mean one, exact log ratios, and a second pass whose gradient is that of new paths."""

from __future__ import annotations

import affine
import pytest
import torch
from affine import Controlled, on_gaussian, riccati
from test_adjoint_matching import quadratic_reward
from tiny import iterate
from torch import Tensor
from torch.distributions import Normal
from torch.testing import assert_close

from tiltflow.control.suffix_weights import suffix_weights
from tiltflow.flows.field import FunctionField
from tiltflow.methods.adjoint_matching import AdjointMatching, State
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.rollout import rollout
from tiltflow.samplers.solvers.memoryless import memoryless
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")

CHAIN = memoryless(time_grid(6))


def other(x: Tensor, t: Tensor) -> Tensor:
    return affine.velocity(x, t) + 0.3 * torch.tanh(x) - 0.2


def test_weights_are_ratios_of_densities() -> None:
    path = rollout(CHAIN, affine.velocity, torch.randn(4, 2, generator=stream(0)), stream(1))
    logs = []
    for k, (x, after) in enumerate(zip(path.states, path.states[1:], strict=False)):
        new, old = (
            Normal(CHAIN.mean(k, x, v(x, CHAIN.times[k])), CHAIN.std[k]).log_prob(after) for v in (other, affine.velocity)
        )
        logs.append((new - old).sum(1))
    found = suffix_weights(path, other)
    assert found.shape == (5, 4)
    for k in range(5):
        assert_close(found[k], torch.stack(logs[k:]).sum(0).exp())


def test_what_guides_the_paths_guides_the_weights() -> None:
    def doubled(x: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return 2 * v

    x = torch.randn(4, 1, generator=stream(0))
    path = rollout(CHAIN, affine.velocity, x, stream(1), act=doubled)
    plain = rollout(CHAIN, lambda x, t: 2 * affine.velocity(x, t), x, stream(1))
    assert torch.equal(suffix_weights(path, affine.velocity, doubled), torch.ones(5, 4))
    assert_close(suffix_weights(path, other, doubled), suffix_weights(plain, lambda x, t: 2 * other(x, t)))


def test_weights_have_mean_one() -> None:
    path = rollout(CHAIN, affine.velocity, torch.randn(20_000, 1, generator=stream(0)), stream(1))
    weights = suffix_weights(path, other)
    z = (weights.mean(1) - 1) / (weights.std(1) / 20_000**0.5)
    assert z.abs().max() < 4
    assert weights.std(1).min() > 0.01


def second_pass(reweight: bool) -> tuple[Tensor, float]:
    """z-scores of the gradient of the second pass at the optimal control, on paths without control; and the mean of the
    relative effective sample size."""
    method = AdjointMatching(num_inference_steps=6, num_passes=2, reweight_passes=reweight)
    optimum, gradients, sizes = riccati(on_gaussian(method.chain())), [], []
    for seed in range(25):
        tuned = Controlled(method.chain(), *(0 * each for each in optimum))
        x, fields = torch.randn(400, 1, generator=stream(seed)), (FunctionField(tuned), FunctionField(affine.velocity))
        passes = iterate(method, *fields, quadratic_reward(), x, stream(seed, "noise"), State())
        assert "effective_sample_size" not in next(passes)
        for parameter, best in zip((tuned.slope, tuned.shift), optimum, strict=True):
            parameter.data.copy_(best)
        tuned.zero_grad()
        sizes.append(next(passes).get("effective_sample_size", 400.0) / 400)
        gradients.append(torch.cat([tuned.slope.grad[:5], tuned.shift.grad[:5]]))
    sample = torch.stack(gradients)
    return sample.mean(0) / (sample.std(0) / 5), sum(sizes) / 25


def test_a_second_pass_has_the_gradient_of_new_paths() -> None:
    z, size = second_pass(reweight=True)
    assert z.abs().max() < 4
    assert 0.5 < size < 0.97
    z, _ = second_pass(reweight=False)
    assert z.abs().max() > 6


def test_the_effective_size_is_that_of_the_first_controlled_step() -> None:
    """In closed form where only one step of a linear problem changes: a shift of w by c has size exp(-c^2) up to noise."""
    method = AdjointMatching(num_inference_steps=6, num_passes=2, reweight_passes=True)
    for step, expected in ((0, torch.tensor(-0.25).exp().item()), (4, torch.tensor(-0.25).exp().item())):
        tuned = Controlled(method.chain())
        x, fields = torch.randn(40_000, 1, generator=stream(0)), (FunctionField(tuned), FunctionField(affine.velocity))
        passes = iterate(method, *fields, quadratic_reward(), x, stream(1), State())
        next(passes)
        tuned.shift.data[step] = 0.5
        assert next(passes)["effective_sample_size"] / 40_000 == pytest.approx(expected, rel=0.02)
