"""ReFL: its gradient against autograd, in closed form on a Gaussian, and which step it is drawn to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_draft import SIZE, Shifted, gradients, network, reward, start
from tiny import iterate
from torch import Tensor
from torch.testing import assert_close

import tiltflow
from tiltflow.errors import InputError
from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.methods.refl import Refl
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")
BASE = FunctionField(lambda x, t: 0 * x)  # is not asked for anything


def late(steps: int, k: int, **settings: Any) -> Refl:
    """ReFL at step k alone."""
    return Refl(num_inference_steps=steps, earliest=k / steps, latest=(k + 1) / steps, **settings)


def predicted(method: Refl, tuned: Any, k: int, draw: Any) -> Tensor:
    """The sample that is predicted at step k, with a graph of its one evaluation."""
    chain, x = method.sampling.chain(), start()
    with torch.no_grad():
        for j in range(k):
            x = chain.x_scale[j] * x + chain.v_scale[j] * tuned(x, chain.times[j].expand(SIZE))
            if chain.std[j] > 0:
                x = x + chain.std[j] * draw()
    return x + (1 - chain.times[k]) * tuned(x, chain.times[k].expand(SIZE))


@pytest.mark.parametrize("cap", [None, 0.3])
@pytest.mark.parametrize("sampler", [{"solver": "euler", "shift": 1.5}, {"solver": "memoryless"}])
def test_the_gradient_is_that_of_the_predicted_sample(sampler: dict[str, Any], cap: float | None) -> None:
    method, tuned = late(5, 3, reward_cap=cap, **sampler), network()
    (measured,) = iterate(method, Flow(tuned), BASE, reward, start(), stream(1), None, micro_batch_size=3)
    found = gradients(tuned)
    torch.randint(3, 4, (), generator=(generator := stream(1)))  # the step is drawn first
    rewards = reward(
        predicted(method, tuned, 3, lambda: torch.randn(SIZE, 2, generator=generator, dtype=torch.float32).double())
    )
    assert cap is None or 0 < (rewards > cap).sum() < SIZE
    (-rewards if cap is None else torch.relu(cap - rewards)).mean().backward()
    for ours, autograd in zip(found, gradients(tuned), strict=True):
        assert_close(ours, autograd, rtol=1e-10, atol=1e-12)
    assert measured["reward"] == pytest.approx(rewards.mean().item(), abs=1e-12)


def test_the_slope_on_a_gaussian_is_the_time_that_is_left() -> None:
    """d E r / d b of a shift of the velocity by b, for r(x) = x, whatever the law of the state: 1 - t."""
    for k in (0, 4, 9):
        method, tuned = late(10, k, solver="memoryless"), Shifted()
        x = torch.randn(4, 1, generator=stream(0))
        list(iterate(method, Flow(tuned), BASE, lambda x: x[:, 0], x, stream(1), None))
        assert tuned.b.grad is not None
        assert -float(tuned.b.grad) == pytest.approx(1 - k / 10, rel=1e-12)


def test_each_late_step_is_drawn_as_often() -> None:
    """And costs its own number of evaluations, one to predict, and one with a gradient."""
    method, counts = Refl(num_inference_steps=8, earliest=0.5), dict.fromkeys(range(4, 8), 0)
    x, asked, tuned = torch.zeros(1, 1), [], Shifted()

    def counting(x: Tensor, t: Tensor) -> Tensor:
        asked.append(torch.is_grad_enabled())
        return tuned(x, t)

    for seed in range(80):
        asked.clear()
        list(iterate(method, FunctionField(counting), BASE, lambda x: x[:, 0], x, stream(seed), None))
        assert asked[-1]
        assert not any(asked[:-1])
        counts[len(asked) - 2] += 1
    assert sum((count - 20) ** 2 / 20 for count in counts.values()) < 16.3  # chi^2 of 3, one in a thousand


def test_published_settings_words_and_refusals() -> None:
    code = Refl(preset="official-code")
    assert (code._window, code.reward_cap, code.sampling.has_noise) == ((30, 40), 2.0, True)
    assert code.optimizer_defaults["learning_rate"] == 1e-5
    target = tiltflow.Refl().target(1)
    assert (target.reaches, target.temperature, target.words[:23]) == ("none", None, "the largest mean reward")
    for values, said in (
        ({"earliest": 0.99}, "earliest 0.99 and latest 1: no step of 20 is between them"),
        ({"solver": "heun"}, "'heun' is no chain of Gaussian steps"),
    ):
        with pytest.raises(InputError, match=said):
            Refl(**values)
