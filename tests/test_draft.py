"""DRaFT: its gradient against autograd through the whole sampler, in closed form on a Gaussian, and what it refuses."""

from __future__ import annotations

from collections import Counter
from typing import Any

import affine
import pytest
import torch
from affine import on_gaussian
from tiny import iterate
from torch import Tensor, nn
from torch.testing import assert_close

import tiltflow
from tiltflow.errors import InputError
from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.flows.guided import Guided
from tiltflow.methods.draft import Draft
from tiltflow.networks.mlp import Mlp
from tiltflow.streams import new_network, stream

pytestmark = pytest.mark.usefixtures("double")
SIZE = 7


def network() -> nn.Module:
    """A velocity of x and t that is linear in neither."""
    found = new_network(Mlp(dimension=2, hidden=8, layers=2), 0).double()
    with torch.no_grad():
        for i, p in enumerate(found.parameters()):
            p.add_(0.3 * torch.randn(p.shape, generator=stream(i, "weights")))
    return found


def reward(x: Tensor) -> Tensor:
    return torch.sin(2 * x[:, 0]) - x[:, 1] ** 2 + x[:, 0] * x[:, 1]


def start() -> Tensor:
    return torch.randn(SIZE, 2, generator=stream(0, "start"))


def by_the_method(method: Draft, tuned: nn.Module, rate: Any = reward, **options: Any) -> tuple[dict[str, float], list[Tensor]]:
    base = FunctionField(lambda x, t: 0 * x)  # is not asked for anything
    (measured,) = iterate(method, Flow(tuned), base, rate, start(), stream(1), None, **options)
    return measured, gradients(tuned)


def gradients(tuned: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in tuned.parameters() if p.grad is not None]
    tuned.zero_grad()
    return found


def noise() -> Any:
    generator = stream(1)
    return lambda: torch.randn(SIZE, 2, generator=generator, dtype=torch.float32).double()


def sampled(method: Draft, tuned: Any, through: int, draw: Any) -> Tensor:
    """The end of the chain, by its definition and with one graph."""
    chain, x = method.sampling.chain(), start()
    for k in range(len(chain)):
        if k == len(chain) - through:
            x = x.detach()
        v = tuned(x, chain.times[k].expand(SIZE))
        x = chain.x_scale[k] * x + chain.v_scale[k] * v
        if chain.std[k] > 0:
            x = x + chain.std[k] * draw()
    return x


SAMPLERS = [{"solver": "euler"}, {"solver": "ddim", "eta": 0.6}, {"solver": "memoryless"}, {"solver": "ddim-half-way"}]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler["solver"])
@pytest.mark.parametrize(("truncation", "through"), [(1, 1), (3, 3), (None, 5)])
def test_the_gradient_is_that_of_autograd_through_the_sampler(
    truncation: int | None, through: int, sampler: dict[str, Any]
) -> None:
    method = Draft(truncation=truncation, num_inference_steps=5, shift=1.5, **sampler)
    measured, found = by_the_method(method, tuned := network(), micro_batch_size=3)
    rewards = reward(sampled(method, tuned, through, noise()))
    (-rewards.mean()).backward()
    for ours, autograd in zip(found, gradients(tuned), strict=True):
        assert_close(ours, autograd, rtol=1e-10, atol=1e-12)
    assert measured["reward"] == pytest.approx(rewards.mean().item(), abs=1e-12) == -measured["loss"]


def test_the_last_step_again_with_fresh_noise() -> None:
    """The gradient of DRaFT-LV is the mean of that of the last step and of those of as many fresh ones as were asked for."""
    method = Draft(num_renoisings=2, num_inference_steps=4, shift=1.5)
    _, found = by_the_method(method, tuned := network(), micro_batch_size=3)
    end, draw, t = sampled(method, tuned, 1, None), noise(), method.sampling.times()[-2]
    total = reward(end).mean()
    for _ in range(2):
        x = t * end.detach() + (1 - t) * draw()
        total = total + reward(x + (1 - t) * tuned(x, t.expand(SIZE))).mean()
    (-total / 3).backward()
    for ours, autograd in zip(found, gradients(tuned), strict=True):
        assert_close(ours, autograd, rtol=1e-10, atol=1e-12)


class Shifted(nn.Module):
    """The velocity of N(0.7, 0.25), plus b."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return affine.velocity(x, t.reshape(-1, 1)) + self.b


def slope(method: Draft, seed: int = 1) -> float:
    """d E r / d b for the reward x."""
    tuned, x = Shifted(), torch.randn(4, 1, generator=stream(0))
    list(iterate(method, Flow(tuned), FunctionField(affine.velocity), lambda x: x[:, 0], x, stream(seed), None))
    assert tuned.b.grad is not None
    return -float(tuned.b.grad)


@pytest.mark.parametrize(
    ("steps", "slopes"),
    [
        (10, {1: 0.100000, 2: 0.205882, 5: 0.501107, 10: 0.811238}),
        (40, {1: 0.025000, 5: 0.130191, 10: 0.267540, 40: 0.847236}),
    ],
)
def test_the_slope_on_a_gaussian(steps: int, slopes: dict[int, float]) -> None:
    """It falls short of that of all steps; that of all is sum_k h_k prod_{j > k} gain_j."""
    for truncation, expected in slopes.items():
        assert slope(Draft(truncation=truncation, num_inference_steps=steps)) == pytest.approx(expected, abs=6e-7)
    chain = Draft(num_inference_steps=steps).sampling.chain()
    gain = on_gaussian(chain).gain
    whole = sum((chain.v_scale[k] * gain[k + 1 :].prod()).item() for k in range(steps))
    assert slope(Draft(truncation=None, num_inference_steps=steps)) == pytest.approx(whole, rel=1e-12)


def test_a_random_truncation_is_each_number_of_steps_as_often() -> None:
    known = {round(slope(Draft(truncation=k, num_inference_steps=4)), 9): k for k in range(1, 5)}
    method = Draft(truncation="random", num_inference_steps=4)
    counts = Counter(known[round(slope(method, seed), 9)] for seed in range(160))
    assert sum((counts[k] - 40) ** 2 / 40 for k in range(1, 5)) < 16.3  # chi^2 of 3, one in a thousand


def test_guided_samples_have_the_gradient_of_their_own_reward() -> None:
    """Through the conditional velocity and the negative one, as samples are drawn."""
    method, tuned = Draft(truncation=None, num_inference_steps=3), network()

    def guide(field: Any) -> Guided:
        return Guided(field, FunctionField(lambda x, t: 0.3 * x), 2.5)

    _, found = by_the_method(method, tuned, guide=guide)
    (-reward(sampled(method, lambda x, t: 0.3 * x + 2.5 * (tuned(x, t) - 0.3 * x), 3, None)).mean()).backward()
    for ours, autograd in zip(found, gradients(tuned), strict=True):
        assert_close(ours, autograd, rtol=1e-10, atol=1e-12)


def test_samples_without_a_reward_are_left_out() -> None:
    """The gradient is that of the mean of the others, whatever the micro-batches."""
    method, tuned = Draft(truncation=None, num_inference_steps=3), network()

    def limited(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 0.5, torch.nan, reward(x))

    found = [by_the_method(method, tuned, limited, non_finite="drop", micro_batch_size=size) for size in (None, 2)]
    end = sampled(method, tuned, 3, None)
    kept = end[:, 0] <= 0.5
    assert 0 < kept.sum() < SIZE
    (-reward(end)[kept].mean()).backward()
    expected = gradients(tuned)
    for measured, ours in found:
        assert measured["dropped"] == float((~kept).sum())
        for mine, autograd in zip(ours, expected, strict=True):
            assert_close(mine, autograd, rtol=1e-10, atol=1e-12)


def test_its_cost() -> None:
    """N evaluations without a gradient; for each step that is gone through, one with; two for each step taken again."""
    asked: Counter[bool] = Counter()
    tuned = network()

    def counting(x: Tensor, t: Tensor) -> Tensor:
        asked[torch.is_grad_enabled()] += len(x)
        return tuned(x, t.expand(len(x)))

    for options, expected in (({"truncation": 2}, (5, 2)), ({"num_renoisings": 2}, (5 + 2, 1 + 2))):
        asked.clear()
        method = Draft(num_inference_steps=5, **options)
        list(iterate(method, FunctionField(counting), FunctionField(counting), reward, start(), stream(1), None))
        assert (asked[False], asked[True]) == tuple(SIZE * count for count in expected)


def test_published_settings() -> None:
    draft, alignprop = Draft(preset="draft-lv"), Draft(preset="alignprop", num_inference_steps=20)
    assert (draft.sampling.has_noise, draft.num_inference_steps, draft.num_renoisings) == (False, 50, 2)
    assert (alignprop.sampling.has_noise, alignprop.num_inference_steps, alignprop.truncation) == (True, 20, "random")
    assert alignprop.optimizer_defaults["learning_rate"] == 1e-3
    assert Draft().optimizer_defaults == {}


def test_words_and_refusals() -> None:
    target = tiltflow.Draft().target(1)
    assert (target.reaches, target.temperature, target.beta) == ("none", None, None)
    assert target.words == "the largest mean reward"
    assert target.caveats[0].startswith("Nothing holds the model near the base")
    assert len(target.caveats) == 2
    assert len(Draft(truncation=None).target(1).caveats) == 1
    with pytest.raises(ValueError, match="maximises mean reward has no law at which it settles"):
        target.law(None, None)  # type: ignore[arg-type]
    for values, said in (
        ({"solver": "heun"}, "'heun' is no chain of Gaussian steps"),
        ({"truncation": 21}, "truncation 21: the sampler has 20 steps; null is all of them"),
        ({"num_renoisings": 1, "truncation": 2}, "it needs truncation 1"),
    ):
        with pytest.raises(InputError, match=said):
            Draft(**values)
    with pytest.raises(InputError, match="the reward has no gradient"):
        by_the_method(Draft(), network(), lambda x: x[:, 0].detach())
