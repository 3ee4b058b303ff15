"""ORW-CFM-W2 against closed forms: its weights, its gradient, the laws of its rounds, its fixed points, and its traps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from tiny import iterate, tiny_recipe
from torch import Tensor, nn

from tiltflow.errors import CollapseError, InputError
from tiltflow.flows.adapter import AdapterOff
from tiltflow.flows.at_weights import AtWeights
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.field import FunctionField, VelocityField
from tiltflow.flows.flow import Flow
from tiltflow.flows.guided import Guided
from tiltflow.flows.interpolant import Cosine, Interpolant, Linear, PredictionType, convert, expand, linear_time
from tiltflow.flows.noise import noise
from tiltflow.laws.gaussian_mixture import ExactVelocity, GaussianMixture
from tiltflow.laws.induced_law import induced_velocity
from tiltflow.laws.law import Array, Law
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2, State, WeightMode, cheapest_pairing
from tiltflow.optimization import WeightAverage
from tiltflow.problems.two_modes import TwoModes
from tiltflow.problems.verification.verify import read_verification, verify
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.settings import apply_overrides, read_yaml, validate
from tiltflow.streams import stream
from tiltflow.training.batch import Batch
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.scoring import Scoring
from tiltflow.training.trainer import train


def first(x: Tensor) -> Tensor:
    """A linear reward."""
    return x[:, 0]


def normal(mean: float = 0.0, scale: float = 1.0) -> GaussianMixture:
    values = (torch.zeros(1), torch.full((1, 1), mean), torch.full((1,), scale**2))
    return GaussianMixture(*(value.double() for value in values))


class Constant(nn.Module):
    """v = the parameter, everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.value.expand_as(x)


class Shifted(nn.Module):
    """The field of N(mean, 1), the mean being the parameter, as the prediction of a network on any path. Every law that
    both-terms reaches from N(0, 1) under a linear reward has such a field."""

    def __init__(self, interpolant: Interpolant | None = None, prediction: PredictionType = "velocity") -> None:
        super().__init__()
        self.interpolant, self.prediction = interpolant or Linear(), prediction
        self.mean = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        c, t = self.interpolant(time), linear_time(self.interpolant, time)
        z = x / expand(c.alpha + c.beta, x)
        slope = (2 * t - 1) / (t**2 + (1 - t) ** 2)
        v = self.mean + expand(slope, x) * (z - expand(t, x) * self.mean)
        return convert(v, z, t, Linear(), "velocity", "x1") if self.prediction == "x1" else self._other(v, z, t, time, x)

    def _other(self, v: Tensor, z: Tensor, t: Tensor, time: Tensor, x: Tensor) -> Tensor:
        if isinstance(self.interpolant, Linear) and self.prediction == "velocity":
            return v
        x1, x0 = z + expand(1 - t, z) * v, z - expand(t, z) * v
        if self.prediction == "epsilon":
            return x0
        c = self.interpolant(time)
        a, b = (-c.beta, c.alpha) if self.prediction == "v" else (c.d_alpha, c.d_beta)
        return expand(a, x) * x1 + expand(b, x) * x0


def gradient_at(value: float, method: OrwCfmW2, *, batches: int = 16, size: int = 20_000) -> tuple[float, float]:
    """The gradient of the loss in a constant velocity, of samples of N(0, 1), and its standard error."""
    flow, base = Flow(Constant(value)), Flow(ExactVelocity(normal()))
    found = []
    for i in range(batches):
        generator = stream(i, "test")
        x1 = torch.randn(size, 1, generator=generator)
        flow.network.value.grad = None  # type: ignore[attr-defined]
        method._regress(Batch(x1, flow, base, first, generator), x1, method.weights(first(x1)))
        found.append(flow.network.value.grad.item())  # type: ignore[attr-defined]
    return float(np.mean(found)), float(np.std(found, ddof=1) / math.sqrt(batches))


@pytest.mark.parametrize("mode", ["normalized", "raw", "both-terms"])
def test_the_gradient_of_the_loss(mode: str) -> None:
    """At v = c, for q = N(0, 1) and w = exp(tau x): 2 E[w (c - x_1 + x_0)] + 2 alpha E[w' (c - v_base)], where E[w x_1] / E[w]
    = tau, E[w] = exp(tau^2 / 2) and E_w[v_base] = tau int t (2 t - 1) / (t^2 + (1 - t)^2) dt."""
    tau, alpha, c = 0.5, 0.7, 0.3
    m = math.exp(tau**2 / 2) if mode == "raw" else 1.0
    along = quad(lambda t: t * (2 * t - 1) / (t**2 + (1 - t) ** 2), 0, 1)[0] if mode == "both-terms" else 0.0
    expected = 2 * m * (c - tau) + 2 * alpha * (c - tau * along)
    value, error = gradient_at(c, OrwCfmW2.model_validate({"tau": tau, "alpha": alpha, "weight_mode": mode}))
    assert error < 0.02
    assert abs(value - expected) < 3.5 * error


def mean_after(
    rounds: int,
    flow: Flow | None = None,
    *,
    passes: int = 200,
    learning_rate: float = 2e-2,
    **settings: Any,
) -> float:
    """Train the mean of `Shifted` from 0 for so many rounds, with tau = 0.5 and both-terms unless said otherwise."""
    tuned = flow or Flow(Shifted())
    method = OrwCfmW2.model_validate(
        {
            "tau": 0.5,
            "weight_mode": "both-terms",
            "num_passes": passes,
            "num_inference_steps": 30,
            "regression_batch_size": 8000,
        }
        | settings
    )
    optimizer = Optimizer(
        learning_rate=learning_rate, lr_scheduler="constant", lr_warmup_steps=0, adam_beta2=0.95, max_grad_norm=None
    )
    base = (
        Flow(ExactVelocity(normal()))
        if flow is None
        else Flow(Shifted(flow.network.interpolant, flow.prediction), flow.prediction, flow.interpolant)
    )  # type: ignore[union-attr]

    start = noise(tuned, (1, 1), stream(0, "scale")) / torch.randn(1, 1, generator=stream(0, "scale"))

    def draw(generator: torch.Generator) -> Tensor:
        """One point in each of 20,000 equally likely parts of the line: their weighted mean is exact to 1e-3."""
        levels = (torch.arange(20_000) + torch.rand(20_000, generator=generator)).double() / 20_000
        return (start * torch.special.ndtri(levels).float()).reshape(-1, 1)

    steps = rounds * passes
    options = {"max_train_steps": steps, "start": tuned.noise_time, "ema_decay": 0.95}
    for _ in train(tuned, base, method, first, draw, optimizer=optimizer, **options):
        pass
    return tuned.network.mean.item()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(("alpha", "rounds"), [(0.5, 1), (0.5, 2), (2.0, 1), (2.0, 3)])
def test_the_rounds_of_a_gaussian_under_a_linear_reward(alpha: float, rounds: int) -> None:
    """N(m_n, 1) with m_n = (tau / alpha) (1 - (1 + alpha)^-n); what is left is the noise of x_0 and t."""
    expected = 0.5 / alpha * (1 - (1 + alpha) ** -rounds)
    assert mean_after(rounds, alpha=alpha) == pytest.approx(expected, abs=0.015)


def test_without_a_penalty_the_mean_drifts_on() -> None:
    """n rounds: m = n tau."""
    assert mean_after(3, alpha=0.0) == pytest.approx(1.5, abs=0.03)


def test_offline_the_tilt_is_applied_once() -> None:
    assert mean_after(4, alpha=0.0, online_fraction=0.0) == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize(("interpolant", "prediction"), [(Cosine(), "epsilon"), (Cosine(), "v"), (Linear(), "x1")])
def test_the_law_is_the_same_on_every_path_and_for_every_prediction(
    interpolant: Interpolant, prediction: PredictionType
) -> None:
    flow = Flow(Shifted(interpolant, prediction), prediction, interpolant)
    assert mean_after(2, flow, alpha=2.0) == pytest.approx(0.25 * (1 - 1 / 9), abs=0.015)


def test_the_spread_of_the_times_does_not_move_the_law() -> None:
    assert mean_after(2, alpha=2.0, shift=3.0) == pytest.approx(0.25 * (1 - 1 / 9), abs=0.015)


def test_optimal_transport_after_drawing_by_weight_keeps_the_tilt() -> None:
    settings = {"coupling": "optimal-transport", "regression_batch_size": 128, "alpha": 0.0}
    assert mean_after(1, passes=300, learning_rate=1e-2, **settings) == pytest.approx(0.5, abs=0.06)


def test_the_cheapest_pairing_sorts_on_the_line() -> None:
    x0, x1 = torch.tensor([[3.0], [-1.0], [0.5]]), torch.tensor([[0.0], [9.0], [-4.0]])
    assert x0[cheapest_pairing(x0, x1)].flatten().tolist() == [0.5, 3.0, -1.0]


def test_a_huge_penalty_returns_the_base() -> None:
    assert mean_after(2, alpha=1e6) == pytest.approx(0, abs=2e-3)


# ---- weights ----


def test_normalised_weights_have_mean_one_and_ignore_the_offset_of_the_reward() -> None:
    rewards = torch.tensor([0.0, 1.0, 2.0, -3.0])
    method = OrwCfmW2(tau=2.0)
    w = method.weights(rewards)
    assert w.mean() == pytest.approx(1)
    assert (w[1] / w[0]).log().item() == pytest.approx(2)
    assert torch.allclose(method.weights(rewards + 500), w)
    raw = OrwCfmW2(tau=2.0, weight_mode="raw").weights(rewards)
    assert raw.tolist() == pytest.approx([1, math.e**2, math.e**4, math.e**-6])


def test_weights_are_normalised_among_samples_of_one_condition() -> None:
    rewards, labels = torch.tensor([0.0, 10.0, 1.0, 10.5]), torch.tensor([3, 7, 3, 7])
    flow, cpu = Flow(Shifted()), torch.device("cpu")
    w = OrwCfmW2().weights(rewards, flow.bind(labels).groups(4, cpu))
    assert w[labels == 3].mean() == pytest.approx(1)
    assert w[labels == 7].mean() == pytest.approx(1)
    assert (w[3] / w[1]).log().item() == pytest.approx(0.5, abs=1e-5)
    embedded = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 2.0]])
    for condition in (embedded, {"prompt_embeds": embedded, "scale": 2.0}):
        assert torch.equal(OrwCfmW2().weights(rewards, flow.bind(condition).groups(4, cpu)), w)


def test_the_effective_sample_size() -> None:
    """exp(tau x) of N(0, 1): exp(-tau^2) of the samples."""
    method = OrwCfmW2(tau=0.5, num_inference_steps=30, regression_batch_size=4)
    steps = iterate(
        method,
        Flow(Shifted()),
        Flow(Shifted()),
        first,
        torch.randn(200_000, 1, generator=stream(0, "test")),
        stream(0),
        State(),
    )
    assert next(iter(steps))["effective_sample_size"] / 200_000 == pytest.approx(math.exp(-0.25), abs=0.01)


def test_the_reward_itself_as_a_weight() -> None:
    method = OrwCfmW2(weight="reward")
    assert method.weights(torch.tensor([0.0, 1.0, 3.0])).tolist() == pytest.approx([0, 0.75, 2.25])
    with pytest.raises(InputError, match="a weight is -1, it must not be negative; subtract its lower bound"):
        method.weights(torch.tensor([1.0, -1.0]))
    with pytest.raises(InputError, match="the weights of 2 samples are all zero"):
        method.weights(torch.zeros(2))


def test_a_weight_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_weights.py").write_text(
        "import torch\nsquare = lambda r: r**2\nbad = lambda r: r.sum()\ninfinite = lambda r: r / 0\nnegative = lambda r: -r\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rewards = torch.tensor([1.0, 2.0])
    assert OrwCfmW2(weight="own_weights:square").weights(rewards).tolist() == pytest.approx([0.4, 1.6])
    for name, message in (
        ("bad", r"own_weights:bad: must return weights \[2\], got \[\]"),
        ("infinite", "weights .* are|largest weight is infinite"),
        ("negative", "a weight is -2, it must not be negative"),
    ):
        with pytest.raises(InputError, match=message):
            OrwCfmW2(weight=f"own_weights:{name}").weights(rewards)
    with pytest.raises(InputError, match="has no 'sqare', did you mean 'square'"):
        OrwCfmW2(weight="own_weights:sqare").weights(rewards)


def test_weights_that_overflow() -> None:
    with pytest.raises(InputError, match=r"infinite \(rewards up to 3, method.tau 200\); lower tau"):
        OrwCfmW2(tau=200.0, weight_mode="raw").weights(torch.tensor([0.0, 3.0]))


# ---- one round ----


def one_step(
    method: OrwCfmW2, reward: Any = first, *, micro: int | None = None, batch: int = 64, flow: Flow | None = None
) -> Any:
    """The measurements of the first optimizer step, and the gradient."""
    tuned = flow or Flow(Shifted())
    base = Flow(ExactVelocity(normal())) if flow is None else flow
    x, state = torch.randn(64, 1, generator=stream(0, "x")), State()
    steps = iterate(method, tuned, base, reward, x, stream(0, "r"), state, micro_batch_size=micro)
    measured = next(iter(steps))
    return measured, [p.grad.item() for p in tuned.parameters() if p.grad is not None]


def test_before_the_first_update_the_penalty_is_zero() -> None:
    measured, gradient = one_step(OrwCfmW2(tau=0.5, alpha=2.0))
    assert measured["velocity_distance"] == pytest.approx(0, abs=1e-10)
    assert gradient[0] != 0
    assert 1 < measured["effective_sample_size"] <= 64
    assert "velocity_distance" not in one_step(OrwCfmW2(alpha=0))[0]  # the base is not even asked


def test_the_weight_travels_with_its_sample() -> None:
    """Rewards of the wrong samples give another gradient; a constant offset does not."""
    gradient = one_step(OrwCfmW2(tau=2.0))[1][0]
    assert one_step(OrwCfmW2(tau=2.0), lambda x: x[:, 0] + 7)[1][0] == pytest.approx(gradient, rel=1e-4)
    assert abs(one_step(OrwCfmW2(tau=2.0), lambda x: x[:, 0].roll(1))[1][0] - gradient) > 0.1


def test_micro_batches_change_nothing_but_memory() -> None:
    whole, parts = one_step(OrwCfmW2()), one_step(OrwCfmW2(), micro=10)
    assert parts[0] == pytest.approx(whole[0], rel=1e-4, abs=1e-6)
    assert parts[1][0] == pytest.approx(whole[1][0], rel=1e-4)


def test_scaling_weights_and_alpha_scales_the_loss() -> None:
    """(w, alpha) and (c w, c alpha) have the same optimum: raw weights, an offset of the reward by log(1000)."""
    plain = one_step(OrwCfmW2(weight_mode="raw", alpha=0.5))
    scaled = one_step(OrwCfmW2(weight_mode="raw", alpha=500.0), lambda x: x[:, 0] + math.log(1000))
    assert scaled[1][0] == pytest.approx(1000 * plain[1][0], rel=1e-4)


class OfLabel(nn.Module):
    """The label, times the parameter, is the velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        assert len(label) == len(x)
        return (self.gain * label)[:, None].expand_as(x)


def test_conditions_travel_with_their_samples() -> None:
    """Samples are x0 + label, so velocity = label is the exact field, and no weighting within labels moves it on average."""
    labels = torch.arange(64) % 4.0
    flow = Flow(OfLabel()).bind(labels)
    assert flow.select(torch.tensor([5, 2])).condition.tolist() == [1, 2]
    for micro in (None, 10):
        for fraction in (1.0, 0.5):
            method = OrwCfmW2(num_inference_steps=2, online_fraction=fraction)
            measured, _ = one_step(method, lambda x: torch.zeros(len(x)) + x[:, 0] * 1e-6, micro=micro, flow=flow)
            assert measured["velocity_distance"] == 0
            assert measured["flow_matching_loss"] < 6  # with the labels of others, it would be some 2.5 more


class Adapted(Shifted):
    """The mean is an adapter: without it, the field is that of N(0, 1)."""

    on = True

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return super().forward(x, time) if self.on else ExactVelocity(normal())(x, time)


def test_an_adapter_is_its_own_base() -> None:
    flow = Flow(Adapted())
    flow.network.mean.data.fill_(0.4)  # type: ignore[attr-defined]
    steps = iterate(OrwCfmW2(), flow, AdapterOff(flow), first, torch.randn(64, 1, generator=stream(0, "x")), stream(0), State())
    measured = next(iter(steps))
    # E (0.4 (1 - t slope))^2 = 0.16 int ((1 - t) / (t^2 + (1 - t)^2))^2 dt, up to the noise of 64 times in 64 equal parts
    assert measured["velocity_distance"] == pytest.approx(0.16 * math.pi / 4, rel=0.02)


WRAPPED: dict[str, Callable[[Flow], VelocityField]] = {
    "guided": lambda flow: Guided(flow, flow, 1.0),
    "guided twice over": lambda flow: Guided(Guided(flow, flow, 1.0), flow, 1.0),
    "in chunks": lambda flow: in_chunks(flow, 7),
    "averaged": lambda flow: AtWeights(flow, WeightAverage(flow.parameters(), 0.0)),
    "guided and averaged": lambda flow: AtWeights(Guided(flow, flow, 1.0), WeightAverage(flow.parameters(), 0.0)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_around_a_flow_does_not_change_the_weight_of_its_times(name: str) -> None:
    """The same field, so the same gradient: errors weigh as those of the prediction of epsilon do."""
    path = Cosine()
    gradients = []
    for wrap in (lambda flow: flow, WRAPPED[name]):
        flow = Flow(Shifted(path, "epsilon"), "epsilon", path)
        base, generator = Flow(Shifted(path, "epsilon"), "epsilon", path), stream(0, "test")
        x1 = torch.randn(64, 1, generator=generator)
        method = OrwCfmW2()
        batch = Batch(x1, wrap(flow), base, first, generator, start=flow.noise_time)
        method._regress(batch, x1, method.weights(first(x1)))
        gradients.append(flow.network.mean.grad.item())  # type: ignore[attr-defined]
    assert gradients[1] == gradients[0] != 0


def test_a_constant_reward_has_nothing_to_teach() -> None:
    with pytest.raises(InputError, match="the reward is 3 for all 64 samples: there is nothing to learn from it"):
        one_step(OrwCfmW2(), lambda x: torch.full((len(x),), 3.0))


def test_a_single_sample_teaches_where_weights_are_raw() -> None:
    method, x = OrwCfmW2(weight_mode="raw", min_effective_sample_size=1), torch.ones(1, 1)
    measured = next(iter(iterate(method, Flow(Shifted()), Flow(Shifted()), first, x, stream(0), State())))
    assert measured["effective_sample_size"] == 1


def test_samples_that_are_dropped_are_counted() -> None:
    def reward(x: Tensor) -> Tensor:
        return x[:, 0].index_fill(0, torch.tensor([3, 7, 60]), math.nan)

    x = torch.randn(64, 1, generator=stream(0, "x"))
    method, flow = OrwCfmW2(), Flow(Shifted())
    assert next(iter(iterate(method, flow, flow, reward, x, stream(0), State(), non_finite="drop")))["dropped"] == 3


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_the_rest_of_the_samples_are_data(fraction: float) -> None:
    method, flow = OrwCfmW2(online_fraction=fraction, num_inference_steps=2), Flow(Shifted())
    data = 100 + torch.arange(5.0)[:, None]
    batch = Batch(torch.randn(64, 1, generator=stream(0, "x")), flow, flow, first, stream(0))
    x1 = method._samples(batch, State(data=data), Scoring(batch))
    assert len(x1) == 64
    assert (x1[:, 0] >= 100).tolist() == [i >= round(64 * fraction) for i in range(64)]


def test_a_collapse_stops_the_run() -> None:
    with pytest.raises(CollapseError, match=r"round 1: the weights of 64 samples rest on 1\.\d of them .* lower method.tau"):
        one_step(OrwCfmW2(tau=100.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -1}, "alpha"),
        ({"tau": 0}, "tau"),
        ({"coupling": "optimal-transport"}, "removes the tilt"),
        ({"solver": "memoryless"}, "has noise"),
        ({"weight": "exponentail"}, "did you mean 'exponential'"),
        ({"data": "x.npz"}, "not used while online_fraction is 1"),
        ({"weight_mode": "norm"}, "weight_mode"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(OrwCfmW2, settings, "method")


def test_data_of_another_shape_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x_train=np.zeros((4, 8, 8), dtype=np.uint8))
    method = OrwCfmW2(online_fraction=0.5, data=str(tmp_path / "d.npz"))
    assert method.new_state((1, 8, 8), 0, torch.device("cpu")).data.shape == (4, 1, 8, 8)  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"method.data: images of shape \[1, 8, 8\], but samples of \[2\]"):
        method.new_state((2,), 0, torch.device("cpu"))


def test_the_tilt_after_some_rounds() -> None:
    """tau sum (1 + alpha)^-k: n tau without a penalty, tau / alpha at last."""
    assert OrwCfmW2(tau=0.5, alpha=0).tilt(4) == 2
    assert OrwCfmW2(tau=0.5, alpha=0.25).tilt(2) == pytest.approx(0.5 * (0.8 + 0.64))
    assert OrwCfmW2(tau=0.5, alpha=0.25).tilt(1000) == pytest.approx(2)
    assert OrwCfmW2(tau=0.5, alpha=0, online_fraction=0).tilt(9) == 0.5
    assert OrwCfmW2(tau=0.5, alpha=0.25, online_fraction=0).tilt(9) == pytest.approx(0.5 * 0.8)
    method = OrwCfmW2(tau=0.5, alpha=0, num_passes=10, weight="reward")
    assert method.target(25).log_tilt(torch.tensor([2.0])).item() == pytest.approx(3 * math.log(2))


def test_without_a_penalty_the_exact_law_is_the_power_of_the_weight() -> None:
    """N(0, 1) under tau = 0.5 and r = x, after 25 steps of 10 a round: three rounds, N(1.5, 1)."""
    method = OrwCfmW2(tau=0.5, alpha=0, num_passes=10)
    law = method.target(25).law(Law.of(lambda x: -(x**2) / 2), lambda x: x)
    assert (law.mean, law.variance) == pytest.approx((1.5, 1), abs=1e-6)


def test_the_target_says_whether_it_is_an_exponential_tilt_and_whether_it_settles() -> None:
    """Three rounds of tau = 0.5 without a penalty: p exp(1.5 r). With alpha = 1/4, two rounds: 1 / (1 - 0.8^2)."""
    drifting = OrwCfmW2(tau=0.5, alpha=0, num_passes=10).target(25)
    assert (drifting.beta, drifting.temperature, drifting.balance) == (None, pytest.approx(1 / 1.5), None)
    assert drifting.words == "p_base(x) exp(1.5 r(x))"
    settling = OrwCfmW2(tau=0.5, alpha=0.25, num_passes=10).target(20)
    assert settling.temperature is None
    assert settling.balance is not None
    assert settling.balance.expected == pytest.approx(1 / 0.36)
    for other in ({"weight": "reward"}, {"online_fraction": 0.0}, {"online_fraction": 0.5}):
        target = OrwCfmW2.model_validate({"alpha": 0.0} | other).target(1)
        assert (target.temperature, target.balance) == (None, None)
    assert OrwCfmW2(alpha=0.25, online_fraction=0.5).target(1).balance is None
    with pytest.raises(ValueError, match="no exact law is known"):
        OrwCfmW2(alpha=0.25, online_fraction=0.5).target(1).law(Law.of(lambda x: -(x**2) / 2), lambda x: x)


@pytest.mark.parametrize(
    ("settings", "said", "reaches"),
    [
        ({"alpha": 0.0}, ["every round tilts the law again"], "exact"),
        ({"alpha": 0.0, "online_fraction": 0.0}, [], "exact"),
        ({"alpha": 0.0, "online_fraction": 0.0, "data": "mine.npz"}, [], "none"),
        ({"alpha": 0.0, "online_fraction": 0.5}, ["hyperbolic"], "none"),
        ({"alpha": 0.0, "online_fraction": 0.0, "weight": "reward"}, ["not exp"], "none"),
        ({"alpha": 0.3}, ["no exponential tilt"], "first-order"),
        ({"alpha": 0.3, "online_fraction": 0.5}, ["no exponential tilt", "hyperbolic"], "none"),
    ],
)
def test_the_reasons_why_the_law_is_another(settings: dict[str, Any], said: list[str], reaches: str) -> None:
    target = OrwCfmW2.model_validate(settings).target(1)
    limits = target.caveats
    assert target.reaches == reaches
    assert len(limits) == len(said)
    assert all(words in limit for words, limit in zip(said, limits, strict=True))


def test_a_single_sample_of_a_condition_teaches_nothing_unless_weights_are_raw() -> None:
    assert "always 1" in str(OrwCfmW2().learns_nothing(1))
    assert OrwCfmW2().learns_nothing(2) is OrwCfmW2(weight_mode="raw").learns_nothing(1) is None


# ---- a network, to the laws that are known ----


class Field(FunctionField):
    """A plain function of (x, t), its errors weighing as those of a prediction that is t times as large."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, expand(t, x))

    def prediction_scale(self, t: Tensor) -> Tensor:
        return t


NOTHING = Field(lambda x, t: torch.zeros_like(x))


@pytest.mark.parametrize(
    ("field", "settings", "expected"),
    [
        # samples of N(0, 1), r = x. E[w x_1] = tau and E[w] = 1, so for v = c t, with weights t^2 of the times,
        # (c tau / 4 - c^2 / 5) / (alpha c^2 / 5)
        (lambda x, t: 0.25 * t.expand_as(x), {"alpha": 0.5}, (5 * 0.8 / (4 * 0.25) - 1) / 0.5),
        (lambda x, t: 0.25 * t.expand_as(x), {"alpha": 0.5, "weight_mode": "both-terms"}, (5 * 0.8 / (4 * 0.25) - 1) / 0.5),
        # v = k x and w = 1: (k E[t^2 (2 t - 1)] - k^2 E[t^2 x_t^2]) / (alpha k^2 E[t^2 x_t^2]), E[x_t^2] = t^2 + (1 - t)^2
        (lambda x, t: 0.5 * x, {"alpha": 2.0, "tau": 1e-9}, ((1 / 2 - 1 / 3) / (0.5 * 7 / 30) - 1) / 2.0),
    ],
)
def test_the_balance_of_a_field_that_is_in_none(
    field: Callable[[Tensor, Tensor], Tensor], settings: dict[str, Any], expected: float
) -> None:
    method = OrwCfmW2.model_validate({"tau": 0.8} | settings)
    generator = stream(0, "test")
    x1 = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    balance = method.balance(Field(field), NOTHING, x1, first(x1), generator, batch_size=70_000)
    assert balance is not None
    assert balance.standard_error < 0.05 * abs(expected)
    assert abs(balance.value - expected) < 4 * balance.standard_error


@pytest.mark.parametrize("mode", ["normalized", "raw", "both-terms"])
def test_the_error_of_the_balance_is_how_much_it_varies(mode: WeightMode) -> None:
    """From one set of 1,000 samples to another; the spread of 200 of them is known to 5 %."""
    method, generator, found = OrwCfmW2(tau=0.4, alpha=0.3, weight_mode=mode), stream(0, "test"), []
    tuned = Field(lambda x, t: 0.3 * x)
    for _ in range(200):
        x1 = 2 + torch.randn(1000, 1, generator=generator, dtype=torch.float64)
        balance = method.balance(tuned, NOTHING, x1, first(x1), generator)
        assert balance is not None
        found.append((balance.value, balance.standard_error))
    values, errors = np.array(found).T
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(np.std(values, ddof=1), rel=0.15)


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 0.5, "online_fraction": 0.5}])
def test_there_is_no_balance_without_a_penalty_or_with_samples_of_others(settings: dict[str, Any]) -> None:
    x1 = torch.randn(10, 1, generator=stream(0, "test"))
    assert OrwCfmW2.model_validate(settings).balance(Field(lambda x, t: x), NOTHING, x1, first(x1), stream(0)) is None


@pytest.mark.parametrize("mean", [0.25, 0.5, 1.0, 1.5])
def test_the_balance_on_the_way_to_the_law_of_a_gaussian(mean: float) -> None:
    """Under tau = 0.3, alpha = 0.3 and r = x, N(0, 1) settles at N(1, 1): at mean m the balance is 1 / m."""
    method = OrwCfmW2(tau=0.3, alpha=0.3, weight_mode="both-terms")
    tuned, generator = Shifted(), stream(0, "test")
    with torch.no_grad():
        tuned.mean.fill_(mean)
    x1 = mean + torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
    balance = method.balance(Flow(tuned), Flow(Shifted()), x1, first(x1), generator)
    assert balance is not None
    assert balance.standard_error < 0.05 / mean
    assert abs(balance.value - 1 / mean) < 4 * balance.standard_error


@pytest.mark.parametrize("mode", ["normalized", pytest.param("raw", marks=pytest.mark.slow)])
def test_the_balance_at_the_law_of_two_modes(mode: WeightMode) -> None:
    """The field that makes the fixed point of a bounded reward, where m varies in space, is in balance."""
    problem, method = TwoModes(), OrwCfmW2(tau=1.0, alpha=0.5, weight_mode=mode)
    base = problem.law()
    q = method.target(10_000).law(base, problem.reward_at)
    logs = method.log_weights(torch.from_numpy(problem.reward_at(q.points))).numpy()
    logs -= np.log(q.probabilities @ np.exp(logs)) if mode == "normalized" else 0
    there = induced_velocity(q, base, logs, method.alpha)

    def flow(field: Callable[[Array, float], Array]) -> VelocityField:
        def v(x: Tensor, t: Tensor) -> Tensor:
            return torch.from_numpy(np.stack([field(x[i].numpy(), float(t[i])) for i in range(len(x))]))

        return FunctionField(v)

    generator = stream(0, "test")
    levels = (torch.randperm(2000, generator=generator).double() + 0.5) / 2000
    x1 = torch.from_numpy(q.quantiles(levels.numpy()))[:, None]
    rewards = torch.from_numpy(problem.reward_at(x1.numpy()[:, 0]))
    balance = method.balance(flow(there), flow(base.velocity), x1, rewards, generator, draws=1)
    assert balance is not None
    assert balance.standard_error < 0.1
    assert abs(balance.value - 1) < 4 * balance.standard_error


def test_there_is_no_balance_before_anything_was_learned() -> None:
    x1 = torch.randn(10, 1, generator=stream(0, "test"))
    assert OrwCfmW2().balance(Flow(Shifted()), Flow(Shifted()), x1, first(x1), stream(0, "test")) is None


def test_a_network_starts_on_its_way_to_the_law_of_two_modes() -> None:
    """One round with alpha = 1: mean reward .308 exactly (see test_induced_law). 150 steps come three quarters of the way."""
    settings = [
        "iterations=150",
        "num_passes=150",
        "num_samples=4000",
        "num_inference_steps=10",
        "sampling.num_inference_steps=10",
    ]
    result = verify(read_verification("two-modes", "orw-cfm-w2", [*settings, "train_batch_size=4096"])).values
    assert result["laws"]["own"]["reward"] == pytest.approx(0.30845, abs=2e-5)
    assert 0.6 < result["reached"]["reward"] / 0.30845 < 1.1
    assert result["laws"]["tilted"]["reward"] > 0  # that of half the tilt: (1 + alpha)^-1 after one round


@pytest.mark.parametrize(
    ("problem", "settings", "message"),
    [
        ("lqg", [], "use two-modes"),
        ("two-modes", ["alpha=1", "online_fraction=0.5"], "no exact law is known"),
        ("two-modes", ["alpha=0", "online_fraction=0.95"], "no law to settle at"),
    ],
)
def test_laws_that_are_not_known_are_refused_before_training(problem: str, settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        verify(read_verification(problem, "orw-cfm-w2", [*settings, "iterations=1", "train_batch_size=64"]))


def test_where_no_closed_form_is_known_verify_says_so() -> None:
    with pytest.raises(InputError, match="known for alpha = 0"):
        verify(read_verification("mixture", "orw-cfm-w2", ["alpha=1", "iterations=1", "train_batch_size=64"]))


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("problem", ["gaussian", "mixture"])
def test_the_law_of_n_rounds(problem: str, rounds: int) -> None:
    """w^n p_base, for a network, in sliced W2 to exact samples."""
    result = verify(read_verification(problem, "orw-cfm-w2", [f"iterations={800 * rounds}"])).values
    assert result["distance"] < 3 * result["floor"]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "alpha"), [("normalized", 1.0), ("normalized", 0.3), ("raw", 1.0), ("both-terms", 1.0)])
def test_the_fixed_point_of_a_network(mode: str, alpha: float) -> None:
    """Within the tolerance of a trained perceptron: .03 in the mean and P(x > 0), .02 in the mean reward."""
    overrides = [f"alpha={alpha}", f"weight_mode={mode}"]
    result = verify(read_verification("two-modes", "orw-cfm-w2", overrides)).values
    own, reached = result["laws"]["own"], result["reached"]
    assert reached["mean"] == pytest.approx(own["mean"], abs=0.05)
    assert reached["positive"] == pytest.approx(own["positive"], abs=0.03)
    assert reached["reward"] == pytest.approx(own["reward"], abs=0.03)


# ---- a run ----


def test_a_run_from_recipe_to_report(tmp_path: Path) -> None:
    method = {"name": "orw-cfm-w2", "num_inference_steps": 2, "num_passes": 2, "alpha": 0.5, "min_effective_sample_size": 1}
    path = tiny_recipe(tmp_path, method=method)
    summary = run(validate(Recipe, read_yaml(path), "recipe"), tmp_path / "run")
    assert summary["target_law"] == "p_base(x) exp(1.11 r(x))"  # 4 steps are 2 rounds: 1 / 1.5 + 1 / 1.5^2
    assert any("no exponential tilt" in limit for limit in summary["limits"])
    assert summary["reaches"] == "first-order"
    assert summary["beta"] is None
    assert summary["w2_base"] > 0 < summary["w2_floor"]
    assert summary["judge"]["entropy_base"] > 0 < summary["judge"]["variance_tuned"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["velocity_distance"] == 0 < rows[1]["velocity_distance"]
    assert rows[0]["reward"] == rows[1]["reward"] != rows[2]["reward"]  # two passes over a round
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Distance of the velocities" in report
    assert summary["own_law_balance_expected"] == pytest.approx(1 / (1 - 1.5**-2))
    assert summary["own_law_balance_error"] > 0
    assert "the ratio of the reward's pull to the penalty is 1" in report
    assert "W2 to the base" in report
    assert "exp(1.11 r(x))" in report


def test_there_is_no_temperature_to_calibrate(tmp_path: Path) -> None:
    path = tiny_recipe(tmp_path, method={"name": "orw-cfm-w2"})
    tree = apply_overrides(read_yaml(path), ["training.calibration_samples=8"])
    with pytest.raises(InputError, match="orw-cfm-w2 has no temperature to calibrate"):
        run(validate(Recipe, tree, "recipe"), tmp_path / "run")
