"""Networks as people have them: other floats, other clocks, other outputs; and one line for what cannot work."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import UNET
from torch import Tensor, nn
from torch.testing import assert_close

import tiltflow
from tiltflow.errors import InputError, UserCodeError
from tiltflow.flows.counting import CountEvaluations
from tiltflow.flows.flow import Flow, TimeDirection
from tiltflow.flows.interpolant import (
    Cosine,
    DiscreteVariancePreserving,
    Interpolant,
    Linear,
    PredictionType,
    VariancePreserving,
)
from tiltflow.models.model import Model, load
from tiltflow.problems.mixture import Mixture
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import new_network, stream

METHODS: dict[str, Any] = {
    "adjoint-matching": tiltflow.AdjointMatching(num_inference_steps=4),
    "score-as-action": tiltflow.ScoreAsAction(num_inference_steps=4),
    "orw-cfm-w2": tiltflow.OrwCfmW2(num_inference_steps=4),
}


class Net(nn.Module):
    """A smooth velocity on the plane."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.enter, self.leave = nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.leave(torch.tanh(self.enter(torch.cat([x, t[:, None].to(x)], 1))))
        return out


def reward(x: Tensor) -> Tensor:
    return -(x - 1).square().sum(1)


def tune(network: Any, method: str = "adjoint-matching", event_shape: tuple[int, ...] = (2,), **options: Any) -> Model:
    training = tiltflow.Training(max_train_steps=2, train_batch_size=8)
    model = Model(Flow(network, **options), event_shape)
    return tiltflow.tune(model, reward, METHODS[method], training, optimizer=tiltflow.Optimizer(learning_rate=1e-2))


# ---- floats ----


@pytest.mark.parametrize("solver", ["memoryless", "heun", "ddpm"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.01)])
def test_samples_are_those_of_float32(dtype: torch.dtype, tolerance: float, solver: str) -> None:
    """From the same noise, at every step, and all else in float32 or better."""
    sampling = Sampling(solver=solver, num_inference_steps=8)
    expected = Model(Flow(Net()), (2,), sampling).sample(64, seed=3)
    found = Model(Flow(Net().to(dtype)), (2,), sampling).sample(64, seed=3)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(found.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_method_tunes_a_network_in_other_floats(dtype: torch.dtype, method: str) -> None:
    """In 16 bits as the same network in float32, whose updates it could not hold; in 64 bits as that, up to float32."""
    rounded = Net().to(dtype).float()
    expected, found = tune(rounded, method).flow, tune(Net().to(dtype), method).flow
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert_close(ours.float(), theirs, rtol=0, atol=1e-4 if dtype == torch.float64 else 0)
    moved = [(p - q).abs().max().item() for p, q in zip(found.parameters(), rounded.to(found.dtype).parameters(), strict=True)]
    assert min(moved) > 1e-3


def test_time_comes_in_float32_or_better() -> None:
    seen = []

    class Seeing(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append((x.dtype, t.dtype))
            return super().forward(x, t)

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        Model(Flow(Seeing().to(dtype)), (2,)).sample(2)
    assert set(seen) == {
        (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32),
    }  # fmt: skip


# ---- one line ----


class Returning(Net):
    """What `change` makes of the prediction."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.change(super().forward(x, t))


@dataclass
class Output:
    """Like diffusers' UNet2DOutput."""

    sample: Tensor


class TimeFirst(Net):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return super().forward(x, t)


class InPlace(Net):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5), t)


class NotCast(Net):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.leave(torch.tanh(self.enter(torch.cat([x, t[:, None]], 1))))
        return out


class Elsewhere(Net):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) + torch.ones(1, device="meta")


MUST = r"^the network must return floats of the shape of x, \[\d+, 2\], and returns "
WRONG: dict[str, tuple[nn.Module, str]] = {
    "one channel": (Returning(lambda v: v[:, :1]), MUST + r"\[\d+, 1\]$"),
    "no channel": (Returning(lambda v: v[:, 0]), MUST + r"\[\d+\]$"),
    "twice the channels": (Returning(lambda v: torch.cat([v, v], 1)), MUST + r"\[\d+, 4\]; .*\(learn_sigma\)\? wrap it"),
    "a tuple": (Returning(lambda v: (v,)), r"and returns tuple; wrap it to return the tensor in there$"),
    "an output": (Returning(Output), r"and returns Output; wrap it"),
    "a mapping": (Returning(lambda v: {"loss": 1, "sample": v}), r"and returns dict; wrap it to return its sample$"),
    "integers": (Returning(lambda v: v.long()), MUST + "int64$"),
    "time first": (TimeFirst(), r"its arguments are \(t, x\): wrap it to be called as network\(x, time\)$"),
    "in place": (InPlace(), "changes its argument x in place"),
    "16 bits": (NotCast().bfloat16(), r"RuntimeError: .*; its time comes in float32: does it need time\.to\(x\.dtype\)\?$"),
    "elsewhere": (
        Elsewhere(),
        r"^the network, called with \[\d+, 2\] float32, \[\d+\] float32, raised .*\(in forward, line \d+ of ",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_one_line(name: str) -> None:
    network, message = WRONG[name]
    with pytest.raises(InputError, match=message) as caught:
        Model(Flow(network), (2,)).sample(3)
    assert "\n" not in str(caught.value)
    if name == "16 bits":
        return  # is tuned in float32
    for method in METHODS:
        with pytest.raises(InputError, match=message):
            tune(network, method)


def test_one_number_for_each_sample_is_no_event_of_one() -> None:
    with pytest.raises(InputError, match=r"the shape of x, \[4, 1\], and returns \[4\]$"):
        Model(Flow(lambda x, t: x[:, 0]), (1,)).sample(4)


def test_what_has_nothing_to_train() -> None:
    with pytest.raises(InputError, match="nothing can be trained: the network must be a torch module with parameters"):
        tune(lambda x, t: -x)
    with pytest.raises(InputError, match="nothing can be trained: the network must be a torch module with parameters"):
        tune(nn.Identity())
    with pytest.raises(InputError, match=r"is cut off from them by torch\.no_grad\(\) or detach\(\)"):
        tune(Returning(Tensor.detach))
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        adapted = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["enter"]))
    adapted.requires_grad_(False)
    with pytest.raises(InputError, match=r"no parameter of the network requires a gradient \(is the adapter frozen\?\)"):
        tune(adapted)


def test_in_the_middle_it_is_an_error_of_user_code() -> None:
    class Breaking(Net):
        calls = 0

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            Breaking.calls += len(x) == 8  # those of training alone: what is looked at before has other sizes
            if Breaking.calls > 3:
                raise ValueError("enough")
            return super().forward(x, t)

    with pytest.raises(UserCodeError, match="raised ValueError: enough"):
        tune(Breaking())


def test_compiled_and_counted_networks_go_through() -> None:
    network = Net()
    compiled = torch.compile(network, backend="eager", dynamic=False)
    with CountEvaluations(network) as count:
        plain = Model(Flow(network), (2,)).sample(4)
        assert count.total == 4 * 40
    assert torch.equal(Model(Flow(compiled), (2,)).sample(4), plain)  # type: ignore[arg-type]


# ---- clocks ----

LAW = Mixture(dimension=2, modes=3, scale=0.4).base()


def network_of(path: Interpolant, prediction: PredictionType, scale: float, direction: TimeDirection) -> Any:
    """A perfect network for the mixture that was trained with such times: what it predicts, by the law's posterior means."""

    def network(x: Tensor, time: Tensor) -> Tensor:
        u = time / scale
        s = 1 - u if direction == "data-to-noise" else u
        c = path(s)
        size = (c.alpha + c.beta)[:, None]
        t, z = c.alpha / (c.alpha + c.beta), x / size
        v = LAW.velocity(z, t)
        x1, x0 = z + (1 - t)[:, None] * v, z - t[:, None] * v
        alpha, beta, d_alpha, d_beta = (each[:, None] for each in (c.alpha, c.beta, c.d_alpha, c.d_beta))
        toward_data = d_alpha * x1 + d_beta * x0
        return {
            "velocity": -toward_data if direction == "data-to-noise" else toward_data,
            "epsilon": x0,
            "v": alpha * x0 - beta * x1,
            "x1": x1,
        }[prediction]

    return network


CLOCKS: list[tuple[float, TimeDirection]] = [(1000.0, "noise-to-data"), (1.0, "data-to-noise"), (1000.0, "data-to-noise")]


@pytest.mark.parametrize(("scale", "direction"), CLOCKS)
@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "v", "x1"])
@pytest.mark.parametrize("path", [Linear(), Cosine(), VariancePreserving()], ids=lambda path: path.name)
@pytest.mark.usefixtures("double")
def test_another_clock_is_the_same_velocity_field(
    path: Interpolant, prediction: PredictionType, scale: float, direction: TimeDirection
) -> None:
    flow = Flow(network_of(path, prediction, scale, direction), prediction, path, time_scale=scale, time_direction=direction)
    t = torch.linspace(flow.noise_time + 1e-3, 0.99, 21)
    x = torch.randn(21, 2, generator=stream(0, "x"))
    assert_close(flow(x, t), LAW.velocity(x, t), rtol=1e-7, atol=1e-7)
    other = Flow(lambda x, time: x, prediction, path)
    assert torch.equal(flow.prediction_scale(t), other.prediction_scale(t))
    assert flow.noise_time == other.noise_time


@pytest.mark.parametrize(("scale", "direction"), CLOCKS)
@pytest.mark.parametrize("solver", ["memoryless", "heun"])
def test_another_clock_gives_the_same_samples(scale: float, direction: TimeDirection, solver: str) -> None:
    sampling = Sampling(solver=solver, num_inference_steps=20)
    usual = Model(Flow(network_of(Linear(), "velocity", 1.0, "noise-to-data")), (2,), sampling)
    flow = Flow(network_of(Linear(), "velocity", scale, direction), time_scale=scale, time_direction=direction)
    assert_close(Model(flow, (2,), sampling).sample(64), usual.sample(64), rtol=0, atol=1e-4)


def test_tuning_with_another_clock_is_the_same() -> None:
    class Reversed(Net):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -super().forward(x, 1 - t / 1000)

    for method in METHODS:
        found = tune(Reversed(), method, time_scale=1000.0, time_direction="data-to-noise").flow
        for ours, theirs in zip(found.parameters(), tune(Net(), method).flow.parameters(), strict=True):
            assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("double")
def test_timesteps_of_a_schedule_may_come_in_another_unit() -> None:
    """Timestep i as i / 1000."""
    path = DiscreteVariancePreserving(num_train_timesteps=1001)
    seen = []

    def epsilon(x: Tensor, timestep: Tensor) -> Tensor:
        seen.append(timestep)
        return x * (1 + torch.cos(timestep / 300))[:, None]

    usual = Flow(epsilon, "epsilon", path)
    scaled = Flow(lambda x, time: epsilon(x, 1000 * time), "epsilon", path, time_scale=1 / 1000)
    t = torch.linspace(usual.noise_time, 0.99, 21)
    x = torch.randn(21, 2, generator=stream(0, "x"))
    assert_close(scaled(x, t), usual(x, t), rtol=1e-9, atol=1e-9)
    assert (seen[0].max() - 1000).abs() < 1e-6
    assert torch.equal(scaled.prediction_scale(t), usual.prediction_scale(t))


def test_a_clock_is_saved_and_one_that_is_not_there_is_the_usual_one(tmp_path: Path) -> None:
    flow = Flow(new_network(UNET, 3), "x1", Cosine(), time_scale=250.0, time_direction="data-to-noise")
    model = Model(flow, (1, 8, 8), Sampling(num_inference_steps=3), UNET)
    model.save(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert (loaded.flow.time_scale, loaded.flow.time_direction) == (250.0, "data-to-noise")
    assert torch.equal(loaded.sample(3), model.sample(3))
    config = tmp_path / "m" / "config.json"
    tree = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in tree.items() if not key.startswith("time_")}))
    old = load(tmp_path / "m")
    assert (old.flow.time_scale, old.flow.time_direction) == (1.0, "noise-to-data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "velosity"}, r"^Flow: there is no prediction 'velosity', did you mean 'velocity'\?$"),
        ({"time_direction": "data-to-nois"}, r"there is no time_direction 'data-to-nois', did you mean 'data-to-noise'\?$"),
        ({"time_scale": 0}, "time_scale must be a number above 0, is 0"),
        ({"time_scale": float("inf")}, "time_scale must be a number above 0, is inf"),
        ({"time_scale": "1000"}, "time_scale must be a number above 0, is '1000'"),
        ({"interpolant": "linear"}, "interpolant must be one of tiltflow.flows.interpolant, is 'linear'"),
        ({"interpolant": Cosine}, r"interpolant must be an instance, such as Cosine\(\)"),
        ({"interpolant": DiscreteVariancePreserving(), "time_direction": "data-to-noise"}, "has its own timesteps"),
    ],
)
def test_a_clock_that_there_is_not(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Flow(Net(), **options)
    with pytest.raises(InputError, match="the network must be callable"):
        Flow("net")  # type: ignore[arg-type]
