"""Stages, against closed forms on a Gaussian: tilts add up, and under a utility of the mean it moves by a known recursion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import affine
import pytest
import torch
from affine import MEAN, VARIANCE, on_gaussian
from test_objective import Controlled
from torch import Tensor, nn
from torch.testing import assert_close

import tiltflow
from tiltflow.errors import InputError, UserCodeError
from tiltflow.flows.flow import Flow
from tiltflow.runs.stages import Utility
from tiltflow.streams import stream

STEPS, SLOPE, BETA, COUNT = 12, 1.2, 0.5, 3
FAST = tiltflow.Optimizer(learning_rate=3e-2, lr_warmup_steps=0, max_grad_norm=None)
SHORT = tiltflow.Training(max_train_steps=150, train_batch_size=16)


def method(beta: float) -> tiltflow.AdjointMatching:
    return tiltflow.AdjointMatching(beta=beta, num_inference_steps=STEPS)


def gaussian() -> tiltflow.Model:
    """N(0.7, 0.25), and all that affine controls of its chain make of it."""
    chain = method(1.0).chain()
    return tiltflow.Model(Flow(Controlled(chain)), (1,), tiltflow.Sampling(solver="memoryless", num_inference_steps=STEPS))


def law(model: tiltflow.Model) -> Tensor:
    """Mean and variance of the samples of a model."""
    network: Any = model.flow.network
    with torch.no_grad():
        chain = on_gaussian(method(1.0).chain()).controlled(network.slope.double(), network.shift.double())
        return torch.stack([each.double() for each in chain.law(torch.zeros(()).double(), torch.ones(()).double())])


@dataclass(frozen=True)
class MeanReward:
    """E_p[a x]: its first variation is a x, wherever it is taken."""

    slope: float

    def first_variation(self, model: tiltflow.Model, seed: int) -> Callable[[Tensor], Tensor]:
        return lambda x: self.slope * x[:, 0]


@dataclass(frozen=True)
class MeanNear:
    """-(E_p[x] - c)^2 / 2, whose first variation is (c - E_p[x]) x."""

    where: float

    def first_variation(self, model: tiltflow.Model, seed: int) -> Callable[[Tensor], Tensor]:
        slope = self.where - model.sample(4000, seed=seed).mean().item()
        return lambda x: slope * x[:, 0]


def test_stages_of_a_mean_reward_are_one_tilt() -> None:
    """N(m, s^2) tilted by exp(a x / beta) is N(m + s^2 a / beta, s^2), in one stage or in three at 3 beta. The chain of 12
    steps is itself off by 1 %."""
    base, means = gaussian(), []
    utility: Utility[tiltflow.Model] = MeanReward(SLOPE)
    for stage in tiltflow.stages(base, utility, method(COUNT * BETA), SHORT, count=COUNT, optimizer=FAST):
        assert stage.number == len(means) + 1
        mean, variance = law(stage.model)
        means.append(mean.item())
        assert variance.item() == pytest.approx(law(base)[1].item(), rel=1e-2)
    whole = VARIANCE * SLOPE / BETA
    assert means == pytest.approx([MEAN + whole * (k + 1) / COUNT for k in range(COUNT)], abs=0.015)
    assert_close(law(base), torch.tensor([MEAN, VARIANCE]).double(), rtol=0.02, atol=0)  # the first base is as it was


def test_the_reward_of_a_stage_is_the_slope_of_the_utility_at_the_last_model() -> None:
    """m_{k+1} = m_k + (c - m_k) s^2 / beta: half the way each time at beta = 2 s^2."""
    expected, where = MEAN, 2.0
    for stage in tiltflow.stages(gaussian(), MeanNear(where), method(2 * VARIANCE), SHORT, count=2, optimizer=FAST):
        expected += (where - expected) / 2
        # the error of a mean of 4000 samples, 0.008, and that of the chain
        assert law(stage.model)[0].item() == pytest.approx(expected, abs=0.03)


def weights(model: tiltflow.Model) -> Tensor:
    network: Any = model.flow.network
    return torch.cat([network.slope, network.shift]).detach()


def test_stages_are_deterministic_and_each_has_a_seed_of_its_own() -> None:
    training = tiltflow.Training(max_train_steps=2, train_batch_size=4)

    def run(seed: int) -> list[Tensor]:
        found = tiltflow.stages(gaussian(), MeanNear(2.0), method(1.0), training, count=2, seed=seed)
        return [weights(stage.model) for stage in found]

    one, again, other = run(3), run(3), run(4)
    assert all(map(torch.equal, one, again))
    assert not torch.equal(one[0], other[0])
    # a stage is `tune` with the seed of its name
    reward = MeanNear(2.0).first_variation(gaussian(), stream(3, "first variation", 1).initial_seed())
    tuned = tiltflow.tune(gaussian(), reward, method(1.0), training, seed=stream(3, "stage", 1).initial_seed())
    assert torch.equal(weights(tuned), one[0])


def test_callbacks_see_every_stage_and_can_end_it() -> None:
    seen: list[int] = []

    def until_the_third(record: Any) -> bool:
        seen.append(record.step)
        return bool(record.step == 3)

    found = list(tiltflow.stages(gaussian(), MeanReward(1.0), method(1.0), SHORT, count=2, callbacks=[until_the_third]))
    assert [stage.number for stage in found] == [1, 2]
    assert seen == [1, 2, 3] * 2


class Adapted(nn.Module):
    """A network with an adapter, as peft's have one."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return affine.velocity(x, t.reshape(-1, 1))

    def disable_adapter(self) -> None: ...


class Broken:
    def first_variation(self, model: Any, seed: int) -> Any:
        return 1 / 0


def test_what_cannot_be_a_stage_is_refused_before_the_first() -> None:
    def attempt(model: Any = None, utility: Any = None, count: Any = 1) -> None:
        tiltflow.stages(model or gaussian(), utility or MeanReward(1.0), method(1.0), SHORT, count=count)

    with pytest.raises(InputError, match="base of a stage is the last model, and this one has an adapter"):
        attempt(tiltflow.Model(Flow(Adapted()), (1,)))
    with pytest.raises(InputError, match="utility must have first_variation"):
        attempt(utility=lambda x: x.sum(1))
    with pytest.raises(InputError, match="utility must have first_variation"):
        attempt(utility=MeanReward)
    with pytest.raises(InputError, match="stages: count must be an integer >= 1, is 0"):
        attempt(count=0)
    with pytest.raises(UserCodeError, match="the utility raised ZeroDivisionError"):
        next(tiltflow.stages(gaussian(), Broken(), method(1.0), SHORT, count=1))
    with pytest.raises(InputError, match="tune: model must be"):
        next(tiltflow.stages("digits-flow", MeanReward(1.0), method(1.0), SHORT, count=1))
