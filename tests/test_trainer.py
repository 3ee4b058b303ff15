"""The training loop: where it ends, what it counts, and what it refuses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import affine
import pytest
import torch
from affine import on_gaussian
from torch import Tensor, nn
from torch.testing import assert_close

from tiltflow.errors import InputError, NonFiniteError
from tiltflow.flows.adapter import AdapterOff
from tiltflow.flows.field import VelocityField
from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import CorrectedVelocity, ExactVelocity
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.models.trainable import trainable_copy
from tiltflow.networks.mlp import Mlp
from tiltflow.optimization import WeightAverage, gradient_norm, load_optimizer
from tiltflow.problems.gaussian import Gaussian
from tiltflow.rewards.functions.failures import count_failures
from tiltflow.samplers.rollout import rollout
from tiltflow.streams import stream
from tiltflow.training.batch import Batch
from tiltflow.training.calibration import Calibration
from tiltflow.training.optimizer import Optimizer, learning_rate_factor
from tiltflow.training.trainer import Record, copied, train

pytestmark = pytest.mark.usefixtures("double")

PROBLEM = Gaussian(dimension=1, mean=affine.MEAN, scale=affine.VARIANCE**0.5, linear=affine.LINEAR)


def draw(generator: torch.Generator) -> Tensor:
    return torch.randn(64, 1, generator=generator)


def flows(seed: int = 0) -> tuple[Flow, Flow]:
    """An MLP on top of the exact velocity, and the exact velocity."""
    torch.manual_seed(seed)  # networks draw their first weights from the global generator
    law = PROBLEM.base()
    return Flow(CorrectedVelocity(ExactVelocity(law), Mlp(dimension=1, hidden=16, layers=2).build())), Flow(ExactVelocity(law))


def run(
    steps: int, seed: int = 0, reward: Callable[[Tensor], Tensor] | None = None, **options: Any
) -> tuple[Flow, list[Record]]:
    tuned, base = flows()
    method = AdjointMatching(num_inference_steps=5)
    options = {"optimizer": Optimizer(learning_rate=1e-2, lr_warmup_steps=2), "seed": seed, **options}
    records = train(tuned, base, method, reward or PROBLEM.reward(), draw, max_train_steps=steps, **options)
    return tuned, list(records)


def weights(flow: Flow) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in flow.parameters()]


def test_rewards_that_fail_are_counted_by_step() -> None:
    """Those of training alone: what somebody computes between the steps is not of it."""

    def failing(x: Tensor) -> Tensor:
        count_failures(3)
        return PROBLEM.reward()(x)

    tuned, base = flows()
    found = []
    for record in train(tuned, base, AdjointMatching(num_inference_steps=5), failing, draw, max_train_steps=2):
        found.append(record.metrics["failed"])
        failing(torch.zeros(2, 1))
    assert found == [3, 3]
    assert "failed" not in run(1)[1][0].metrics


@pytest.mark.parametrize(("failed", "steps"), [(3, []), (7, [2])])
def test_rewards_that_fail_for_many_samples_are_told_once(failed: int, steps: list[int]) -> None:
    """More than a twentieth of 64 a step, once there are eight of them."""
    told = []

    def failing(x: Tensor) -> Tensor:
        count_failures(failed)
        return PROBLEM.reward()(x)

    tuned, base = flows()
    training = train(tuned, base, AdjointMatching(num_inference_steps=5), failing, draw, max_train_steps=4)
    for step in range(1, 5):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            next(training)
        told += [step] * len(caught)
    assert told == steps


# ---- where it ends ----


def test_training_reaches_the_tilted_gaussian() -> None:
    """For a linear reward the adjoint is deterministic, so the loss is sum |w - w*|^2: twice the KL divergence to the optimum.

    By Talagrand's inequality the terminal law is then within sqrt(variance * loss) of the optimum in W2.
    """
    tuned, base = flows()
    method, optimizer = AdjointMatching(num_inference_steps=8), Optimizer(learning_rate=5e-3, lr_warmup_steps=0)
    records = list(train(tuned, base, method, PROBLEM.reward(), draw, max_train_steps=120, optimizer=optimizer))
    chain = method.chain()
    exact = on_gaussian(chain)
    mean, variance = (value.item() for value in exact.law())
    shift = affine.LINEAR * exact.law(0.0, 0.0)[1].item()  # c Var(X_K | X_0), the mean of the optimum
    target = torch.stack([-affine.LINEAR * exact.gain[k + 1 :].prod() for k in range(8)])
    assert records[0].metrics["loss"] == pytest.approx((chain.std * target).square().sum().item())
    assert records[-1].metrics["loss"] < records[0].metrics["loss"] / 1000

    n, generator = 4000, stream(7)
    with torch.no_grad():
        path = rollout(chain, tuned, torch.randn(n, 1, generator=generator), generator)
        x = path.states[-1] + base(path.states[-1], chain.times[-2]) / 8
    slack = math.sqrt(variance * records[-1].metrics["loss"])
    assert abs(x.mean() - mean - shift) < slack + 4 * math.sqrt(variance / n)
    assert abs(x.std() - math.sqrt(variance)) < slack + 4 * math.sqrt(variance / (2 * n))


def test_two_runs_are_the_same_bit_for_bit() -> None:
    first, second, other = run(6, micro_batch_size=20), run(6, micro_batch_size=20), run(6, seed=1)
    assert [r.metrics for r in first[1]] == [r.metrics for r in second[1]]
    assert all(torch.equal(a, b) for a, b in zip(weights(first[0]), weights(second[0]), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(first[0]), weights(other[0]), strict=True))
    assert first[1][1].metrics["reward"] != first[1][0].metrics["reward"]  # every step draws anew


def test_global_generator_is_left_alone() -> None:
    tuned, base = flows()
    before = torch.get_rng_state()
    list(train(tuned, base, AdjointMatching(num_inference_steps=4), PROBLEM.reward(), draw, max_train_steps=2))
    assert torch.equal(torch.get_rng_state(), before)


# ---- one weight, a known gradient ----


class OneWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x * self.weight


@dataclass
class GivenGradients:
    """A method whose gradients are given: `batches` of them, one list for each batch of trajectories."""

    batches: list[list[float]]
    loss: float = 1.0

    @property
    def optimizer_defaults(self) -> dict[str, Any]:
        return {
            "learning_rate": 0.1,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "adam_beta1": 0.8,
            "adam_beta2": 0.9,
            "adam_weight_decay": 0.5,
            "max_grad_norm": None,
        }

    def new_state(self, *about: Any) -> None:
        return None

    def gradients(self, batch: Batch, state: Any) -> Iterator[dict[str, float]]:
        assert isinstance(batch.tuned, Flow)
        (weight,) = batch.tuned.parameters()
        for value in self.batches.pop(0):
            batch.tuned(batch.x, torch.tensor(0.5))
            assert weight.grad is None or not weight.grad.any()
            weight.grad = torch.tensor([value])
            yield {"loss": self.loss}


def run_given(method: GivenGradients, steps: int, **options: Any) -> tuple[Flow, list[Record], list[float]]:
    tuned = Flow(OneWeight())
    records, path = [], []
    for record in train(tuned, Flow(OneWeight()), method, PROBLEM.reward(), draw, max_train_steps=steps, **options):
        records.append(record)
        path.append(tuned.network.weight.item())
    return tuned, records, path


def adamw(
    gradients: list[float], rates: list[float], beta1: float = 0.8, beta2: float = 0.9, decay: float = 0.5
) -> list[float]:
    """1711.05101, algorithm 2, by hand."""
    weight, m, v, path = 1.0, 0.0, 0.0, []
    for step, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        weight -= rate * (decay * weight + (m / (1 - beta1**step)) / (math.sqrt(v / (1 - beta2**step)) + 1e-8))
        path.append(weight)
    return path


def test_weights_follow_adamw_under_the_schedule() -> None:
    method = GivenGradients([[0.3], [-0.5], [2.0], [0.1]])
    _, records, _ = run_given(method, 4, optimizer=Optimizer(lr_warmup_steps=2, lr_warmup_from_zero=True))
    assert [r.metrics["learning_rate"] for r in records] == pytest.approx([0.0, 0.05, 0.1, 0.1])
    method = GivenGradients([[0.3], [-0.5], [2.0], [0.1]])
    _, records, path = run_given(method, 4, optimizer=Optimizer(lr_warmup_steps=2))
    assert path == pytest.approx(adamw([0.3, -0.5, 2.0, 0.1], [0.05, 0.1, 0.1, 0.1]))
    assert [r.metrics["learning_rate"] for r in records] == pytest.approx([0.05, 0.1, 0.1, 0.1])
    assert [r.metrics["gradient_norm"] for r in records] == pytest.approx([0.3, 0.5, 2.0, 0.1])
    assert [r.step for r in records] == [1, 2, 3, 4]


def test_long_gradients_are_cut_and_their_length_is_shown() -> None:
    _, records, path = run_given(GivenGradients([[0.3], [-5.0]]), 2, optimizer=Optimizer(max_grad_norm=0.5))
    assert path == pytest.approx(adamw([0.3, -0.5], [0.1, 0.1]), abs=1e-5)  # torch adds 1e-6 to the norm it divides by
    assert records[1].metrics["gradient_norm"] == 5


def test_loop_stops_in_the_middle_of_a_batch() -> None:
    method = GivenGradients([[0.3, -0.5], [2.0, 0.1]])
    _, records, path = run_given(method, 3)
    assert path == pytest.approx(adamw([0.3, -0.5, 2.0], [0.1] * 3))
    assert [r.network_evaluations for r in records] == [64, 128, 192]


def test_samples_are_counted_once_however_often_they_are_learned_from() -> None:
    _, records, _ = run_given(GivenGradients([[0.3, -0.5, 0.2], [2.0, 0.1]]), 5)
    assert [r.samples_drawn for r in records] == [64, 64, 64, 128, 128]


def test_a_batch_is_told_how_many_were_drawn_before() -> None:
    told: list[int] = []

    class Numbered:
        def at(self, drawn: int) -> Callable[[torch.Generator], Tensor]:
            told.append(drawn)
            return draw

        def __call__(self, generator: torch.Generator) -> Tensor:
            raise AssertionError("not told")

    method = GivenGradients([[0.3, -0.5, 0.2], [2.0], [0.1]])
    list(train(Flow(OneWeight()), Flow(OneWeight()), method, PROBLEM.reward(), Numbered(), max_train_steps=5))
    assert told == [0, 64, 128]


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    factors = [learning_rate_factor(step, warmup=4, total=10) for step in range(1, 11)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1]
    assert factors[4:] == pytest.approx([(1 + math.cos(math.pi * k / 6)) / 2 for k in range(1, 7)])
    assert [learning_rate_factor(step, warmup=1, total=3, scheduler="constant") for step in (1, 2, 3)] == [1, 1, 1]
    assert learning_rate_factor(5, warmup=5, total=5) == 1


# ---- the moving average ----


def test_parameters_become_their_moving_average_at_the_end() -> None:
    method = GivenGradients([[0.3], [-0.5], [2.0], [0.1]])
    tuned, _, path = run_given(method, 4, ema_decay=0.15)
    average = 1.0
    for step, weight in enumerate(path, 1):
        decay = min(0.15, step / (step + 10))
        average = decay * average + (1 - decay) * weight
    assert tuned.network.weight.item() == pytest.approx(average)


def test_a_closed_loop_leaves_the_average_too() -> None:
    tuned = Flow(OneWeight())
    loop = train(
        tuned, Flow(OneWeight()), GivenGradients([[0.3]] * 9), PROBLEM.reward(), draw, max_train_steps=9, ema_decay=0.99
    )
    next(loop)
    (weight,) = adamw([0.3], [0.1])
    assert tuned.network.weight.item() == pytest.approx(weight)
    loop.close()
    assert tuned.network.weight.item() == pytest.approx(1 / 11 + weight * 10 / 11)


def test_without_average_the_last_weights_stay() -> None:
    tuned, _, path = run_given(GivenGradients([[0.3], [-0.5]]), 2)
    assert tuned.network.weight.item() == path[-1]


def test_average_of_a_constant_is_the_constant() -> None:
    parameter = nn.Parameter(torch.tensor([2.0, -1.0]))
    average = WeightAverage([parameter], 0.9)
    for _ in range(50):
        average.update()
    average.store()
    assert_close(parameter.detach(), torch.tensor([2.0, -1.0]))


def test_average_is_applied_for_a_while() -> None:
    parameter = nn.Parameter(torch.tensor([2.0]))
    average = WeightAverage([parameter], 0.9)
    with torch.no_grad():
        parameter.fill_(5.0)
    with average.applied():
        assert parameter.item() == 2
    assert parameter.item() == 5
    average.update()  # 1 / 11 of the first weight, as above
    average.store()
    assert parameter.item() == pytest.approx(2 / 11 + 5 * 10 / 11)


def test_trajectories_are_drawn_from_the_average() -> None:
    """What the policy of each batch is, against AdamW and the average by hand: its second update has decay 2 / 12."""
    seen: list[float] = []

    class Watching(GivenGradients):
        def gradients(self, batch: Batch, state: Any) -> Iterator[dict[str, float]]:
            assert batch.actor is not None
            seen.append(batch.actor(torch.ones(1, 1), torch.tensor(0.5)).item())
            assert batch.actor(torch.ones(1, 1), torch.tensor(0.5)).item() == seen[-1]
            yield from super().gradients(batch, state)

    run_given(Watching([[0.3], [-0.5], [0.1]]), 3, ema_decay=0.9)
    first, second, _ = adamw([0.3, -0.5, 0.1], [0.1, 0.1, 0.1])
    after_one = 1 / 11 + first * 10 / 11
    assert seen == pytest.approx([1.0, after_one, after_one * 2 / 12 + second * 10 / 12])


# ---- calibration ----


def test_the_method_works_at_the_calibrated_temperature() -> None:
    """The adjoint of a linear reward is its gradient over beta: the gradient norm of the first step after a change tells it."""
    calibration = Calibration(target_reward=100.0, beta=1.0)
    _, records = run(3, temperature=calibration)
    assert [record.metrics["beta"] for record in records] == [1.0, pytest.approx(1 / 3), pytest.approx(1 / 3)]
    assert [record.metrics["beta_at_limit"] for record in records] == [0.0, 1.0, 1.0]
    plain = run(3)[1]
    assert records[0].metrics["loss"] == plain[0].metrics["loss"]
    # two steps in, the control is still small: the loss is close to the square of the adjoint
    assert records[1].metrics["loss"] / plain[1].metrics["loss"] == pytest.approx(9, rel=0.1)


# ---- refusals ----


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (GivenGradients([[0.3]], loss=math.nan), "step 1: the loss is nan"),
        (GivenGradients([[math.inf]]), "step 1: the gradient norm is inf"),
        (GivenGradients([[math.nan]]), "step 1: the gradient norm is nan"),
    ],
)
def test_bad_numbers_stop_before_the_weights_change(method: GivenGradients, message: str) -> None:
    tuned = Flow(OneWeight())
    with pytest.raises(NonFiniteError, match=message):
        list(train(tuned, Flow(OneWeight()), method, PROBLEM.reward(), draw, max_train_steps=3))
    assert tuned.network.weight.item() == 1


def test_a_reward_that_breaks_later_leaves_the_weights_before_it() -> None:
    calls = 0

    def reward(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x[:, 0] * (torch.nan if calls == 3 else 1)

    tuned, base = flows()
    method, history = AdjointMatching(num_inference_steps=4), []
    loop = train(tuned, base, method, reward, draw, max_train_steps=5, optimizer=Optimizer(lr_warmup_steps=0))
    for _ in range(2):
        next(loop)
        history.append(weights(tuned))
    with pytest.raises(NonFiniteError, match="not finite for 64 of 64"):
        next(loop)
    assert all(torch.equal(a, b) for a, b in zip(weights(tuned), history[-1], strict=True))


def test_nothing_to_train_is_refused() -> None:
    _, base = flows()
    with pytest.raises(InputError, match="no parameter"):
        next(train(base, base, AdjointMatching(), PROBLEM.reward(), draw, max_train_steps=1))


def test_gradient_norm_is_that_of_all_parameters_together() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([2.0, 3.0]), torch.tensor([6.0])
    assert gradient_norm(parameters, None, 1) == 7
    assert gradient_norm(parameters, 3.5, 1) == 7
    assert_close(parameters[1].grad, torch.tensor([3.0]), rtol=0, atol=1e-6)  # torch adds 1e-6 to the norm it divides by


# ---- counting and copies ----


def test_network_evaluations_are_counted() -> None:
    """5 steps, the last without noise: 4 tuned in the rollout, 5 base in the adjoint, 4 tuned in the regression."""
    _, records = run(2)
    assert [r.network_evaluations for r in records] == [64 * 13, 64 * 26]
    assert 0 < records[0].seconds < records[1].seconds


def test_an_adapter_is_counted_once() -> None:
    network = OneWeight()
    flow = Flow(network)
    method = GivenGradients([[0.3]])
    (record,) = train(flow, AdapterOff(flow), method, PROBLEM.reward(), draw, max_train_steps=1)
    assert record.network_evaluations == 64


def test_trainable_copy_is_a_copy_that_can_be_trained() -> None:
    original = Flow(OneWeight().requires_grad_(False), "v", condition=None)
    copy = trainable_copy(original)
    assert copy.prediction == "v"
    assert [p.requires_grad for p in copy.network.parameters()] == [True]
    with torch.no_grad():
        copy.network.weight.fill_(5)
    assert original.network.weight.item() == 1
    assert not original.network.weight.requires_grad


def test_trainable_copy_of_some_parameters() -> None:
    original = Flow(Mlp(dimension=1, hidden=4, layers=2).build())
    names = [name for name, _ in original.network.named_parameters()]
    copy = trainable_copy(original, r"\.weight$")
    assert [p.requires_grad for p in copy.network.parameters()] == [name.endswith(".weight") for name in names]
    with pytest.raises(InputError, match=r"training.trainable: no parameter name matches 'middle'"):
        trainable_copy(original, "middle")


def test_a_state_is_copied_into_the_memory_of_an_earlier_copy() -> None:
    tree: dict[str, Any] = {"a": torch.ones(3), "state": {0: {"b": torch.zeros(2, 2)}}, "step": 1}
    first = copied(tree)
    places = first["a"].data_ptr(), first["state"][0]["b"].data_ptr()
    tree["a"] += 1
    tree["state"][0]["b"] = torch.ones(2, 2)
    second = copied(tree | {"step": 2, "c": torch.ones(1)}, first)
    tree["a"] += 1
    assert (second["a"].data_ptr(), second["state"][0]["b"].data_ptr()) == places
    assert (second["a"].tolist(), second["state"][0]["b"].sum().item(), second["step"]) == ([2, 2, 2], 4, 2)
    assert copied({"a": torch.ones(4)}, second)["a"].shape == (4,)
    assert second["a"].shape == (3,)


class Learning:
    """A slope that learns, and some of whose steps end in a loss that is not finite."""

    def __init__(self, bad: set[int]) -> None:
        self.slope, self.calls, self.bad = nn.Parameter(torch.ones(1)), 0, bad
        self.network = nn.ParameterList([self.slope])
        self.optimizer = torch.optim.AdamW([self.slope], lr=0.1, weight_decay=0.0)

    def __call__(self, x: Tensor) -> Tensor:
        return self.slope.detach() * x[:, 0]

    def learn(self, x: Tensor, field: VelocityField, generator: torch.Generator) -> dict[str, float]:
        self.calls += 1
        self.slope.grad = torch.ones(1)
        self.optimizer.step()
        if self.calls in self.bad:
            raise NonFiniteError("not finite", {"what": "loss"})
        return {"reward_loss": 0.0}

    def state_dict(self) -> dict[str, Any]:
        return {"slope": self.slope.detach(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.slope.copy_(state["slope"])
        load_optimizer(self.optimizer, state["optimizer"])


def test_a_reward_is_as_before_each_batch_that_is_skipped() -> None:
    """Its optimizer's count of steps too, which that takes from the state that it loads as it is."""
    states = []
    reward = Learning(bad={2, 4})
    run(4, reward=reward, max_skipped_steps=1, on_batch_end=lambda end: states.append(copied(end.state()["reward"])))
    counts = [int(state["optimizer"]["state"][0]["step"]) for state in states]
    assert counts == [1, 1, 2, 2]
    assert [state["slope"].item() for state in states] == pytest.approx([0.9, 0.9, 0.8, 0.8])
