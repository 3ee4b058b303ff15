"""A network on a wrong clock, read backwards or taken for another prediction is found out; a right one never is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import tiltflow
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import DiscreteVariancePreserving, PredictionType
from tiltflow.laws.gaussian_mixture import GaussianMixture
from tiltflow.models.consistency import DIFFERENT, WORST, consistency, samples_needed
from tiltflow.models.model import Model, load
from tiltflow.problems.gaussian import Gaussian
from tiltflow.problems.mixture import Mixture
from tiltflow.streams import stream

LAWS = {
    "mixture": Mixture(dimension=2, modes=3, scale=0.4).base(),
    "ring": Mixture(dimension=2).base(),
    "gaussian": Gaussian(dimension=2).base(),
    "far": Gaussian(dimension=3, mean=5.0, scale=2.0).base(),
    "normal": Gaussian(dimension=2, mean=0.0, scale=1.0).base(),
    "narrow": Gaussian(dimension=2, mean=0.0, scale=0.3).base(),
}
Network = Callable[[Tensor, Tensor], Tensor]
MOLECULES = ("qm9-flow", "qm9-isomers-flow")


def wrong(network: Network) -> dict[str, Network]:
    """As if it had been trained with other times than it is called with."""
    return {
        "times to 1000": lambda x, t: network(x, t / 1000),
        "backwards": lambda x, t: -network(x, 1 - t),
        "backwards, times to 1000": lambda x, t: -network(x, 1 - t / 1000),
        "sign alone": lambda x, t: -network(x, t),
        "time alone": lambda x, t: network(x, 1 - t),
    }


def of(law: GaussianMixture) -> tuple[Network, tuple[int, ...], Tensor]:
    return law.velocity, (law.means.shape[1],), law.sample(1024, stream(1, "data")).float()


@pytest.mark.parametrize("name", LAWS)
def test_a_right_network_is_right(name: str) -> None:
    network, shape, data = of(LAWS[name])
    for seed in range(3):
        for x in (None, data):
            found = consistency(Model(Flow(network), shape), x, seed=seed)
            assert found.worst < (1 + WORST) / 2, (name, seed, found)
            assert found.difference < DIFFERENT
            assert not found.wrong
            assert list(found.errors) == sorted(found.errors, reverse=True)
    half = Flow(lambda x, t: -network(x, 1 - t / 1000), time_scale=1000.0, time_direction="data-to-noise")
    assert not consistency(Model(half, shape)).wrong


SAME = {("normal", "backwards"), ("narrow", "backwards")}
"""Gaussians around 0: read backwards each is the field of another one, whose samples it draws."""


@pytest.mark.parametrize("name", LAWS)
def test_a_wrong_clock_is_found(name: str) -> None:
    network, shape, data = of(LAWS[name])
    for fault, bad in wrong(network).items():
        model = Model(Flow(bad), shape)
        assert consistency(model).wrong == ((name, fault) not in SAME), fault
        # N(0, I) read backwards is itself: nothing is wrong with it
        assert consistency(model, data).wrong == ((name, fault) != ("normal", "backwards")), fault


def test_another_prediction_is_found() -> None:
    for name in ("mixture", "gaussian", "narrow"):
        network, shape, _ = of(LAWS[name])
        for prediction in ("epsilon", "x1", "v"):
            assert consistency(Model(Flow(network, prediction), shape)).wrong, (name, prediction)  # type: ignore[arg-type]
    assert consistency(Model(Flow(lambda x, t: x * torch.nan), (2,))).wrong


SLOW = pytest.mark.slow
DIGITS, LARGE = ("digits-flow", "digits-diffusion"), [pytest.param(name, marks=SLOW) for name in MOLECULES]
"""With `digits-latent-flow` all that ship and are checked."""


class Called(torch.nn.Module):
    """A network that is asked at other times than it is called with, and whose answer has another sign."""

    def __init__(self, network: torch.nn.Module, time: Callable[[Tensor], Tensor], sign: float):
        super().__init__()
        self.network, self.time, self.sign = network, time, sign

    def forward(self, x: Tensor, time: Tensor, *condition: Any) -> Tensor:
        out: Tensor = self.sign * self.network(x, self.time(time), *condition)
        return out


def faults(model: Model) -> dict[str, Model]:
    """A trained model on wrong clocks, backwards, and taken for other predictions."""
    flow: Any = model.flow
    last = flow.interpolant.num_train_timesteps - 1 if isinstance(flow.interpolant, DiscreteVariancePreserving) else 1
    clocks: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
        "times to 1000": (lambda t: t / 1000, 1),
        "thousandths": (lambda t: t * 1000, 1),
        "a tenth": (lambda t: t / 10, 1),
        "half": (lambda t: t / 2, 1),
        "backwards": (lambda t: last - t, -1),
        "backwards, times to 1000": (lambda t: last - t / 1000, -1),
        "sign alone": (lambda t: t, -1),
        "time alone": (lambda t: last - t, 1),
    }
    found = {name: replace(flow, network=Called(flow.network, *clock)) for name, clock in clocks.items()}
    found |= {f"as {kind}": replace(flow, prediction=kind) for kind in get_args(PredictionType) if kind != flow.prediction}
    return {name: replace(model, flow=each) for name, each in found.items()}


@pytest.mark.parametrize("name", ["digits-latent-flow", *(pytest.param(name, marks=SLOW) for name in DIGITS), *LARGE])
def test_a_wrong_clock_or_prediction_of_a_trained_network_is_found(name: str) -> None:
    """Without its data."""
    for fault, bad in faults(load(name)).items():
        assert consistency(bad).wrong, fault


@pytest.mark.parametrize("name", ["digits-latent-flow", *DIGITS, *LARGE])
def test_trained_networks_are_right(name: str) -> None:
    model = load(name)
    for seed in range(3):
        found = consistency(model, seed=seed)
        assert not found.wrong, found
        assert found.worst < 1.2
        assert found.difference < 0.045
    finding = tiltflow.examine_model(model)
    assert finding.level == "green", finding
    assert finding.check == "denoising"


def test_what_is_said() -> None:
    network, shape, data = of(LAWS["mixture"])
    finding = tiltflow.examine_model(Model(Flow(wrong(network)["times to 1000"]), shape), data)
    assert finding.level == "amber"
    assert "of the variance of the data at t = 0.1, 0.3, 0.5, 0.7, 0.9" in finding.text
    assert "time_scale=1000" in finding.remedy
    with pytest.raises(InputError, match=r"data must be 32 or more samples of shape \[2\], got \[512, 3\]"):
        tiltflow.examine_model(Model(Flow(network), shape), torch.zeros(512, 3))
    with pytest.raises(InputError, match="raised ValueError: no"):
        tiltflow.examine_model(Model(Flow(refuses), shape))
    assert [samples_needed(shape) for shape in ((2,), (1, 28, 28), (64,))] == [1024, 32, 128]


def refuses(x: Tensor, t: Tensor) -> Tensor:
    raise ValueError("no")


class Affine(torch.nn.Module):
    """The exact field of N(0.7, 0.25 I), plus a correction that is 0."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.bias = scale, torch.nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return LAWS["gaussian"].velocity(x, t / self.scale) + self.bias


@pytest.mark.filterwarnings("error::UserWarning")
def test_tune_says_so_and_goes_on() -> None:
    method = tiltflow.AdjointMatching(num_inference_steps=3)
    training = tiltflow.Training(max_train_steps=1, train_batch_size=4)

    def tune(flow: Flow) -> Model:
        return tiltflow.tune(Model(flow, (2,)), lambda x: x.sum(1), method, training)

    with pytest.warns(UserWarning, match="not the velocity field of the law that it samples: does it take times up to 1000"):
        wrongly = tune(Flow(Affine(1000.0)))
    assert wrongly.flow.network.bias.abs().sum() > 0  # type: ignore[attr-defined]
    tune(Flow(Affine(1000.0), time_scale=1000.0))
    tune(Flow(Affine()))
