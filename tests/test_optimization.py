"""What all training loops share: the learning rate, the average of weights, norms of gradients, and where numbers went bad."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tiltflow.errors import NonFiniteError
from tiltflow.methods import Tilting
from tiltflow.optimization import (
    WeightAverage,
    adamw,
    all_finite,
    finite,
    gradient_norm,
    load_optimizer,
    located,
    refuse_non_finite,
)
from tiltflow.training.optimizer import learning_rate_factor

pytestmark = pytest.mark.usefixtures("double")


def test_the_log_tilt_is_the_reward_over_the_temperature() -> None:
    target = Tilting(beta=0.25).target(7)
    assert target.log_tilt(torch.tensor([1.0, -0.5], dtype=torch.float32)).tolist() == [4, -2]
    assert (target.beta, target.temperature, target.caveats) == (0.25, 0.25, ())
    assert target.reaches == "exact"
    assert Tilting().priced_chain() is None


def test_the_learning_rate_rises_and_falls() -> None:
    """Linear to 1 over 4 steps, then half a cosine over the 6 that are left: a third of the way 3/4, half way 1/2."""
    factors = [learning_rate_factor(step, warmup=4, total=10) for step in range(1, 11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1]
    assert factors[4:] == pytest.approx([(1 + math.sqrt(0.75)) / 2, 0.75, 0.5, 0.25, (1 - math.sqrt(0.75)) / 2, 0])
    assert [learning_rate_factor(step, warmup=4, total=10, scheduler="constant") for step in (2, 4, 5, 10)] == [0.5, 1, 1, 1]
    assert learning_rate_factor(1, warmup=0, total=1) == pytest.approx(0)
    assert learning_rate_factor(5, warmup=5, total=5) == 1


def test_the_average_of_weights_by_hand() -> None:
    """The memory is 1/11, 2/12, .. of an update until that is longer than the decay asked for."""
    weight = nn.Parameter(torch.zeros(1))
    average = WeightAverage([weight], decay=0.15)
    expected = 0.0
    for update, decay in enumerate((1 / 11, 0.15, 0.15), start=1):
        with torch.no_grad():
            weight.fill_(update)
        average.update()
        expected = decay * expected + (1 - decay) * update
        assert_close(average.values[0], torch.tensor([expected]))
    with average.applied():
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 3


def test_without_a_decay_there_is_nothing_to_average() -> None:
    average = WeightAverage([nn.Parameter(torch.ones(2))], decay=0)
    average.update()
    assert average.parameters == average.values == []


def test_gradients_are_clipped_to_a_common_norm() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for limit, after in ((None, [3.0, -4.0]), (10.0, [3.0, -4.0]), (0.5, [0.3, -0.4])):
        for parameter, value in zip(parameters, (3.0, -4.0), strict=True):
            parameter.grad = torch.tensor([value])
        assert gradient_norm(parameters, limit, 1) == pytest.approx(5)
        assert [p.grad.item() for p in parameters if p.grad is not None] == pytest.approx(after, abs=1e-6)
    parameters[1].grad = torch.tensor([math.inf])
    with pytest.raises(NonFiniteError, match="step 7: the gradient norm is inf") as caught:
        gradient_norm(parameters, 1.0, 7, ["first", "second"])
    assert caught.value.where["parameters"] == ["second"]


def test_bad_numbers_are_found_by_step_time_and_sample() -> None:
    values = torch.zeros(3, 4, 2)
    values[1, 2, 0], values[2, 3, 1] = math.nan, math.inf
    times = torch.tensor([0.0, 0.25, 0.5, 1.0])
    with pytest.raises(
        NonFiniteError, match=r"velocity is not finite at 2 of 3 steps \(t = 0.25 to 0.5\) for 2 of 4 samples"
    ) as caught:
        all_finite(values, "velocity", times)
    assert (caught.value.where["sampler_steps"], caught.value.where["samples"]) == ([1, 2], [2, 3])
    with pytest.raises(NonFiniteError) as caught, located(slice(10, 14)):
        all_finite(values, "velocity", times)
    assert caught.value.where["samples"] == [12, 13]
    all_finite(values[:1], "velocity", times)
    all_finite(torch.full((2, 4, 2), 3e38), "velocity", times)  # whose sum is not finite
    with pytest.raises(NonFiniteError, match=r"advantage is not finite at 1 of 3 steps .* for 1 of 4 samples"):
        all_finite(values[:, :, 1], "advantage", times)
    assert finite(torch.tensor(2.0), "loss", 3) == 2
    with pytest.raises(NonFiniteError, match="step 3: loss is nan"):
        finite(math.nan, "loss", 3)


def test_an_optimizer_goes_on_as_if_it_had_not_stopped() -> None:
    """Its moments have the shape of their parameter, its count of steps has not."""
    weights = [nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]])) for _ in range(2)]
    optimizers = [adamw([weight], lr=0.1) for weight in weights]
    for step in range(4):
        if step == 2:
            load_optimizer(optimizers[1], copy.deepcopy(optimizers[0].state_dict()))
            with torch.no_grad():
                weights[1].copy_(weights[0])
        for weight, optimizer in list(zip(weights, optimizers, strict=True))[: 1 if step < 2 else 2]:
            weight.grad = torch.full((2, 2), 1.0 + step)
            optimizer.step()
    assert torch.equal(*weights)
    assert [state["step"].shape for state in optimizers[1].state.values()] == [torch.Size([])]


@pytest.mark.parametrize("values", [[1.0, math.inf], [-math.inf, 1.0], [math.nan, 1.0]])
def test_an_infinity_at_either_end_is_refused(values: list[float]) -> None:
    bad = torch.tensor(values)
    with pytest.raises(NonFiniteError, match="b and 1 other tensors of the model are not finite"):
        refuse_non_finite({"a": torch.ones(2), "b": bad, "c": torch.tensor([], dtype=torch.float32), "d": bad}, "the model")
    refuse_non_finite({"a": torch.ones(2), "b": torch.tensor([3])}, "the model")


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float64, True), (torch.bfloat16, None)])
def test_adamw_is_fused_where_the_device_has_that(dtype: torch.dtype, fused: bool | None) -> None:
    optimizer = adamw([nn.Parameter(torch.ones(2, dtype=dtype))], lr=1e-3)
    assert optimizer.defaults["fused"] is fused
