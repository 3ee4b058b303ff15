"""The flow: every kind of network is the same velocity field; the base, its adapter and its Jacobian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tiltflow.flows.adapter import AdapterOff, base_of
from tiltflow.flows.at_weights import AtWeights
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.counting import CountEvaluations
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import (
    Cosine,
    DiscreteVariancePreserving,
    Interpolant,
    Linear,
    PredictionType,
    VariancePreserving,
)
from tiltflow.flows.linearize import linearize
from tiltflow.optimization import WeightAverage

pytestmark = pytest.mark.usefixtures("double")

MEAN, VARIANCE = 0.7, 0.25
STABLE_DIFFUSION = DiscreteVariancePreserving(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
PATHS = [Linear(), Cosine(), VariancePreserving(), STABLE_DIFFUSION]
PREDICTIONS: list[PredictionType] = ["velocity", "epsilon", "v", "x1"]


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    """The velocity of N(0.7, 0.25) on the linear path."""
    return MEAN + (t * VARIANCE - (1 - t)) / (t**2 * VARIANCE + (1 - t) ** 2) * (x - t * MEAN)


def gaussian_network(path: Interpolant, prediction: PredictionType) -> Any:
    """What a perfect network trained on N(0.7, 0.25) predicts, in the path's own coordinates and the network's time."""

    def network(x: Tensor, time: Tensor) -> Tensor:
        s = 1 - (time + 1) / path.num_train_timesteps if isinstance(path, DiscreteVariancePreserving) else time
        c = path(s[:, None])
        total = c.alpha**2 * VARIANCE + c.beta**2
        x1 = MEAN + c.alpha * VARIANCE / total * (x - c.alpha * MEAN)
        x0 = c.beta / total * (x - c.alpha * MEAN)
        match prediction:
            case "velocity":
                return c.d_alpha * x1 + c.d_beta * x0
            case "epsilon":
                return x0
            case "v":
                return c.alpha * x0 - c.beta * x1
            case "x1":
                return x1

    return network


def small_network(generator: torch.Generator, width: int = 8) -> nn.Sequential:
    network = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return network


class Small(nn.Module):
    """(x, time) -> a smooth function of both, with its body recomputed in the backward pass if asked to."""

    def __init__(self, generator: torch.Generator, use_reentrant: bool | None = None):
        super().__init__()
        self.body, self.use_reentrant = small_network(generator), use_reentrant

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x + time[:, None]
        if self.use_reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


# ---- the velocity field ----


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_every_network_of_a_gaussian_is_the_same_velocity_field(path: Interpolant, prediction: PredictionType) -> None:
    flow = Flow(gaussian_network(path, prediction), prediction, path)
    # the last timestep of a discrete network sits at s = 0.999, beyond it there is nothing to ask
    end = 0.95 if isinstance(path, DiscreteVariancePreserving) else 1 - 1e-3
    t = torch.linspace(flow.noise_time + 1e-3, end, 41)
    x = torch.linspace(-2, 3, 41)[:, None]
    # cancellation where a prediction says little: |conditioning| < 1 / alpha beta = 1e3, rounding 1e-16
    assert_close(flow(x, t), gaussian_velocity(x, t[:, None]), rtol=1e-10, atol=1e-10)
    assert_close(flow(x, t[7]), gaussian_velocity(x, t[7]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("path", "prediction"),
    [(Linear(), "velocity"), (Linear(), "x1"), (Cosine(), "v")]
    + [(path, prediction) for path in (VariancePreserving(), STABLE_DIFFUSION) for prediction in PREDICTIONS],
)
def test_velocity_field_reaches_the_noise(path: Interpolant, prediction: PredictionType) -> None:
    """Where alpha = 0, epsilon says nothing about the data; every other pair here has alpha > 0 or says it."""
    flow = Flow(gaussian_network(path, prediction), prediction, path)
    x, t = torch.linspace(-2, 3, 11)[:, None], torch.tensor(flow.noise_time)
    # the coefficients are taken sqrt(eps) = 1.5e-8 inside, and VP velocities are steep in time
    assert_close(flow(x, t), gaussian_velocity(x, t), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "prediction"), [(Linear(), "velocity"), (Linear(), "epsilon"), (Cosine(), "v"), (Cosine(), "velocity")]
)
def test_velocity_field_reaches_the_data(path: Interpolant, prediction: PredictionType) -> None:
    x, t = torch.linspace(-2, 3, 11)[:, None], torch.ones(())
    flow = Flow(gaussian_network(path, prediction), prediction, path)
    assert_close(flow(x, t), gaussian_velocity(x, t), rtol=0, atol=1e-6)


def test_linear_velocity_network_is_passed_through() -> None:
    flow = Flow(lambda x, time: 3 * x + time[:, None])
    x, t = torch.tensor([[1.0], [2.0]]), torch.tensor([0.1, 0.7])
    assert torch.equal(flow(x, t), 3 * x + t[:, None])
    assert torch.equal(flow(x, t[1]), 3 * x + t[1])


def test_network_in_float32_sees_float32() -> None:
    seen = []
    Flow(lambda x, time: seen.append((x.dtype, time.dtype)) or x, "v", Cosine())(torch.zeros(2, 1).float(), torch.tensor(0.5))
    assert seen == [(torch.float32, torch.float32)]


def test_noise_time_is_where_the_last_timestep_sits() -> None:
    assert Flow(lambda x, t: x).noise_time == 0
    alpha = 0.0682652  # sqrt(abar_999) of Stable Diffusion, printed as .0683
    assert Flow(lambda x, t: x, "epsilon", STABLE_DIFFUSION).noise_time == pytest.approx(
        alpha / (alpha + (1 - alpha**2) ** 0.5), abs=1e-6
    )


def test_bind_passes_the_condition_to_the_network() -> None:
    flow = Flow(lambda x, time, condition=0: x + condition)
    x, t = torch.ones(2, 1), torch.tensor(0.5)
    bound = flow.bind(torch.tensor([[1.0], [2.0]]))
    assert bound(x, t).tolist() == [[2], [3]]
    assert flow(x, t).tolist() == [[1], [1]]


# ---- the base ----


def test_base_is_a_frozen_copy(generator: torch.Generator) -> None:
    network = Small(generator).train()
    flow = Flow(network, "v", Cosine(), condition=None)
    base = base_of(flow)
    x, t = torch.randn(4, 2, generator=generator), torch.tensor(0.3)
    before = flow(x, t)
    assert torch.equal(base(x, t), before)
    assert isinstance(base, Flow)
    assert list(base.parameters()) == []
    assert not base.network.training
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    assert torch.equal(base(x, t), before)
    assert not torch.equal(flow(x, t), before)
    assert len(list(flow.parameters())) == 4
    assert network.training


def test_base_of_a_function_is_the_function() -> None:
    flow = Flow(gaussian_velocity)
    assert base_of(flow) == flow


# ---- derivatives and sizes ----


def jacobian_product(flow: Any, x: Tensor, t: Tensor, cotangent: Tensor) -> Tensor:
    """J^T cotangent by the full Jacobian, sample by sample."""
    rows = []
    for i in range(len(x)):
        ti = t[i : i + 1] if t.ndim else t
        jacobian = torch.autograd.functional.jacobian(lambda y, ti=ti: flow(y[None], ti)[0], x[i])
        rows.append(jacobian.T @ cotangent[i])
    return torch.stack(rows)


@pytest.mark.parametrize("t", [0.3, [0.1, 0.5, 0.9]])
def test_linearize_gives_value_and_jacobian_product(t: Any, generator: torch.Generator) -> None:
    flow, time = Flow(Small(generator), "v", Cosine()), torch.tensor(t)
    x, cotangent = torch.randn(2, 3, 2, generator=generator)
    with torch.no_grad():  # as inside a method
        v, pullback = linearize(flow, x, time)
        product = pullback(cotangent)
    assert not v.requires_grad
    assert not x.requires_grad
    assert torch.equal(v, flow(x, time))
    assert_close(product, jacobian_product(flow, x, time, cotangent))


@pytest.mark.parametrize("size", [None, 1, 2, 5, 7])
def test_chunks_change_the_memory_only(size: int | None, generator: torch.Generator) -> None:
    sizes = []
    network = Small(generator)
    network.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    x = torch.randn(5, 2, generator=generator)
    flow = Flow(network)
    # matrix products of another height may round differently
    assert_close(in_chunks(flow, size)(x, torch.tensor(0.3)), flow(x, torch.tensor(0.3)), rtol=1e-14, atol=1e-14)
    assert sizes[:-1] == {None: [5], 1: [1] * 5, 2: [2, 2, 1]}.get(size, [5])


def test_count_evaluations_counts_samples_of_each_network_once(generator: torch.Generator) -> None:
    first, second = Small(generator), Small(generator)
    x, t = torch.zeros(3, 2), torch.tensor(0.5)
    with CountEvaluations(first, second, first, gaussian_velocity) as count:
        Flow(first)(x, t)
        Flow(second)(x[:2], t)
        assert count.total == 5
    Flow(first)(x, t)
    assert count.total == 5


# ---- adapters ----


class LikeAnAdapter(nn.Module):
    """Adds an adapter to a network and can switch it off, as peft does, in a few lines."""

    def __init__(self, base: nn.Module, adapter: nn.Module):
        super().__init__()
        self.base, self.adapter, self.enabled = base, adapter, True
        base.requires_grad_(False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.base(x, time) + self.adapter(x, time) if self.enabled else self.base(x, time)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.enabled = False
        yield
        self.enabled = True


def test_adapter_off_is_the_base_without_a_copy(generator: torch.Generator) -> None:
    original, adapter = Small(generator), Small(generator)
    flow = Flow(LikeAnAdapter(original, adapter), "v", Cosine())
    base = base_of(flow)
    assert isinstance(base, AdapterOff)
    assert base.flow is flow
    x, t = torch.randn(3, 2, generator=generator), torch.tensor(0.3)
    assert torch.equal(base(x, t), Flow(original, "v", Cosine())(x, t))
    assert flow.network.enabled
    assert not torch.equal(flow(x, t), base(x, t))


def lora(network: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)  # peft draws its adapter from the global generator
    return peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["body.0", "body.2"]))


def train_a_little(network: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        network(x, torch.zeros(len(x))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_lora_off_is_the_original_network_bit_for_bit(generator: torch.Generator) -> None:
    network = Small(generator)
    x, t = torch.randn(4, 2, generator=generator), torch.tensor(0.3)
    original, weights = Flow(network)(x, t).detach(), {id(p) for p in network.parameters()}
    flow = Flow(lora(network))
    base = base_of(flow)
    assert isinstance(base, AdapterOff)
    assert {id(p) for p in flow.network.parameters() if not p.requires_grad} == weights
    assert torch.equal(flow(x, t), original)
    assert torch.equal(base(x, t), original)
    train_a_little(flow.network, x)
    assert not torch.equal(flow(x, t), original)
    assert torch.equal(base(x, t), original)
    assert all(p.requires_grad == (id(p) not in weights) for p in flow.network.parameters())


@pytest.mark.parametrize("use_reentrant", [None, False])
def test_lora_off_has_the_jacobian_of_the_base(use_reentrant: bool | None, generator: torch.Generator) -> None:
    """With checkpointing the forward runs again in the backward pass: with the adapter still off?"""
    network = Small(generator)
    x, cotangent = torch.randn(2, 3, 2, generator=generator)
    t = torch.tensor(0.3)
    expected = jacobian_product(Flow(network), x, t, cotangent)
    flow = Flow(lora(network))
    train_a_little(flow.network, x)
    tuned = jacobian_product(flow, x, t, cotangent)
    network.use_reentrant = use_reentrant
    v, pullback = linearize(base_of(flow), x, t)
    assert_close(pullback(cotangent), expected)
    assert not torch.allclose(expected, tuned)
    assert torch.equal(v, base_of(flow)(x, t))


def test_the_average_has_the_jacobian_of_its_own_weights(generator: torch.Generator) -> None:
    network = Small(generator, use_reentrant=False)
    flow, average = Flow(network), WeightAverage(network.parameters(), 0.5)
    x, cotangent = torch.randn(2, 3, 2, generator=generator)
    t = torch.tensor(0.3)
    expected, before = flow(x, t).detach(), jacobian_product(flow, x, t, cotangent)
    for parameter in network.parameters():
        parameter.data = parameter.data * 2
    now = flow(x, t).detach()
    v, pullback = linearize(AtWeights(flow, average), x, t)
    assert torch.equal(v, expected)
    assert_close(pullback(cotangent), before)
    with average.applied(), average.applied():
        assert torch.equal(flow(x, t), expected)
    assert torch.equal(flow(x, t), now)
    assert not torch.allclose(now, expected)


def test_reentrant_checkpointing_is_refused(generator: torch.Generator) -> None:
    """Outside the switch it would give the Jacobian of the tuned network without a word."""
    v, pullback = linearize(Flow(Small(generator, use_reentrant=True)), torch.zeros(3, 2), torch.tensor(0.3))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        pullback(v)


@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "v", "x1"])
@pytest.mark.parametrize("interpolant", [Linear(), Cosine()])
def test_the_scale_of_a_prediction(prediction: PredictionType, interpolant: Interpolant) -> None:
    """A prediction that is larger by the scale changes the velocity by 1."""
    t, x = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    flow = Flow(lambda x, time: torch.zeros_like(x), prediction, interpolant)
    scale = flow.prediction_scale(t)
    more = Flow(lambda x, time: scale[:, None].expand_as(x), prediction, interpolant)
    torch.testing.assert_close((more(x, t) - flow(x, t)).abs(), torch.ones_like(x))
