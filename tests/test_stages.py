"""Stages, against closed forms on a Gaussian: tilts add up, and under utilities of the law it moves by known recursions."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import affine
import pytest
import torch
from affine import MEAN, VARIANCE, Controlled, on_gaussian
from tiny_pipelines import tiny_pipeline
from torch import Tensor, nn
from torch.testing import assert_close

import tiltflow
from tiltflow.errors import InputError, UserCodeError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.flows.flow import Flow
from tiltflow.reports.stages import write_stages_report
from tiltflow.runs.recipe import find_recipe, read_recipe, read_recipe_tree
from tiltflow.runs.staged import outer_loop as outer
from tiltflow.runs.staged.of_law import EPS
from tiltflow.runs.staged.outer_loop import Utility
from tiltflow.runs.staged.recipe import StagedRecipe
from tiltflow.runs.staged.run import run_stages
from tiltflow.streams import stream
from tiltflow.utilities.augmented_lagrangian import AugmentedLagrangian
from tiltflow.utilities.entropy import Entropy
from tiltflow.utilities.kl import Kl
from tiltflow.utilities.log_barrier import LogBarrier
from tiltflow.utilities.mean_variance import MeanVariance
from tiltflow.utilities.mmd import Mmd
from tiltflow.utilities.renyi import Renyi
from tiltflow.utilities.spread_conditions import SpreadConditions
from tiltflow.utilities.sum import Sum
from tiltflow.utilities.superquantile import Superquantile

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


@pytest.mark.slow
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


@pytest.mark.slow
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

    with pytest.raises(InputError, match="base of a stage is an earlier model, and this one has an adapter"):
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


# ---- where a stage begins ----


def test_a_warm_start_is_in_the_weights_and_not_in_the_base() -> None:
    still, short = tiltflow.Optimizer(learning_rate=1e-9), tiltflow.Training(max_train_steps=1, train_batch_size=4)
    base, reward = normal(), lambda x: x[:, 0]
    tuned = tiltflow.tune(base, reward, method(1.0), short, optimizer=still, adapter=None, start=normal(1.0, 1.0))
    assert moments(tuned) == pytest.approx([1.0, 1.0], abs=1e-6)
    assert moments(base) == pytest.approx([MEAN, VARIANCE])
    refused: list[tuple[dict[str, Any], str]] = [
        ({"start": base}, "start gives the weights of the whole network"),
        ({"start": gaussian(), "adapter": None}, "start has another network than the model"),
        ({"start": "digits-flow", "adapter": None}, "start must be a model"),
    ]
    for options, says in refused:
        with pytest.raises(InputError, match=says):
            tiltflow.tune(base, reward, method(1.0), short, **options)
    with pytest.raises(InputError, match="tilt-matching counts its law from the base"):
        tiltflow.tune(base, reward, tiltflow.TiltMatching(), short, adapter=None, start=base)


@pytest.mark.slow
def test_a_warm_start_leaves_the_law_as_it_is() -> None:
    """From N(-1, 1), far away, the tilt of N(0.7, 0.25) by exp(1.2 x / beta) is found as from that law itself."""
    far = tiltflow.Training(max_train_steps=250, train_batch_size=64)
    options: dict[str, Any] = {"method": method(1.0), "training": far, "optimizer": FAST, "adapter": None}
    cold = tiltflow.tune(normal(), lambda x: SLOPE * x[:, 0], **options)
    warm = tiltflow.tune(normal(), lambda x: SLOPE * x[:, 0], start=normal(-1.0, 1.0), **options)
    assert moments(warm) == pytest.approx(moments(cold), abs=0.02)
    assert moments(warm)[0] == pytest.approx(MEAN + VARIANCE * SLOPE, abs=0.05)


# ---- utilities of tiltflow.utilities ----


class Normal(nn.Module):
    """The velocity of N(mean, exp(log)): of whatever it becomes."""

    def __init__(self, mean: float = MEAN, variance: float = VARIANCE):
        super().__init__()
        self.mean, self.log = nn.Parameter(torch.tensor([mean])), nn.Parameter(torch.tensor([variance]).log())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return affine.velocity(x, t.reshape(-1, 1), self.mean, self.log.exp())  # type: ignore[arg-type]


def normal(mean: float = MEAN, variance: float = VARIANCE) -> tiltflow.Model:
    return tiltflow.Model(Flow(Normal(mean, variance)), (1,), tiltflow.Sampling(num_inference_steps=40))


def moments(model: tiltflow.Model) -> list[float]:
    network: Any = model.flow.network
    return [network.mean.item(), network.log.exp().item()]


def exactly(model: tiltflow.Model, reward: Any, method: Any, *arguments: Any, **options: Any) -> tiltflow.Model:
    """`tune` for a reward whose gradient is affine: N(m, v) tilted by exp(r / beta) is a normal law again."""
    mean, variance = moments(model)
    x = torch.tensor([[mean - 0.5], [mean], [mean + 0.5]], requires_grad=True)
    low, middle, high = (torch.autograd.grad(reward(x).sum(), x)[0][:, 0].double() / method.beta).tolist()
    assert high - middle == pytest.approx(middle - low, abs=1e-4)
    tilted = 1 / (1 / variance - (high - low))
    return normal(mean + tilted * middle, tilted)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages without the errors of training."""
    monkeypatch.setattr(outer, "tune", exactly)


X = {"reward": lambda x: x[:, 0]}
ALPHA, MIXING = 0.5, 0.2


def from_base(base: str, mixing: float = MIXING, steps: int = STEPS) -> dict[str, Any]:
    """Arguments of `stages` that make the same laws from either base."""
    beta = ALPHA if base == "first" else ALPHA / mixing
    own = {"mixing": mixing} if base == "first" else {"price": ALPHA}
    return {"method": method(beta).model_copy(update={"num_inference_steps": steps}), "base": base, **own}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("base", ["last", "first"])
def test_entropy_at_a_price_spreads_a_gaussian_by_a_known_recursion(base: str) -> None:
    """p_{k+1} is proportional to p_k^(1 - w) p_0^w exp(-w log p_k / alpha) from either base: precisions q obey q_{k+1} =
    (1 - w - w / alpha) q_k + w q_0, and settle at q_0 alpha / (1 + alpha)."""
    utility, q, first = tiltflow.OfLaw(Entropy(), num_samples=1000), 1 / VARIANCE, 1 / VARIANCE
    noise = (EPS / (1 - EPS)) ** 2  # in the variance that scores know
    for stage in tiltflow.stages(normal(), utility, count=12, **from_base(base)):
        q = (1 - MIXING - MIXING / ALPHA) * q + MIXING * first
        mean, variance = moments(stage.model)
        assert variance == pytest.approx(1 / q, rel=2 * noise / VARIANCE)
        assert mean == pytest.approx(MEAN, abs=1e-3)
        assert stage.after is not None
        entropy = 0.5 * (1 + torch.tensor(2 * torch.pi / q).log().item())
        assert abs(stage.after.value - entropy) < 4 * stage.after.standard_error
    assert variance / VARIANCE == pytest.approx((1 + ALPHA) / ALPHA, rel=2 * noise / VARIANCE + 1e-3)


@pytest.mark.usefixtures("exact")
def test_one_stage_at_one_plus_the_price_is_the_best_entropy() -> None:
    """p exp((-(1 + alpha) log p + alpha log p_0) / beta) at beta = 1 + alpha has no p left: from p_0, and from any law."""
    utility, noise = tiltflow.OfLaw(Entropy(), num_samples=200), (EPS / (1 - EPS)) ** 2
    options = {"method": method(1 + ALPHA), "price": ALPHA, "base": "last"}
    for stage in tiltflow.stages(normal(), utility, count=2, **options):
        # of scores with noise: (1 + alpha) / (v + noise) = alpha / (v_0 + noise)
        expected = (1 + ALPHA) / ALPHA * (VARIANCE + noise) - noise
        assert moments(stage.model) == pytest.approx([MEAN, expected], rel=5e-3)


def mean_variance(c: float, w: float) -> Iterator[list[float]]:
    """Mean and variance after each stage for E x - c Var x - alpha KL on N(m0, v0), which is tilted by linear x - square x^2,
    mixed of (1 + 2 c m) x - c x^2."""
    m, linear, square = MEAN, 0.0, 0.0
    while True:
        linear, square = (1 - w) * linear + w * (1 + 2 * c * m), (1 - w) * square + w * c
        v = 1 / (1 / VARIANCE + 2 * square / ALPHA)
        m = v * (MEAN / VARIANCE + linear / ALPHA)
        yield [m, v]


def test_mean_variance_at_a_price_settles_at_its_optimum() -> None:
    """m = m0 + v0 / alpha, 1 / v = 1 / v0 + 2 c / alpha."""
    found = next(islice(mean_variance(1.5, 0.5), 200, None))
    assert found == pytest.approx([MEAN + VARIANCE / ALPHA, 1 / (1 / VARIANCE + 2 * 1.5 / ALPHA)])


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("base", ["last", "first"])
def test_mean_variance_at_a_price_moves_by_a_known_recursion(base: str) -> None:
    utility = tiltflow.OfLaw(MeanVariance(aversion=1.5), rewards=X, num_samples=2000)
    laws = mean_variance(1.5, 0.5)
    for last in tiltflow.stages(normal(), utility, count=5, **from_base(base, 0.5)):
        assert moments(last.model) == pytest.approx(next(laws), abs=0.03)  # of 2000 samples in each stage
    if base == "first":  # of rewards alone: the KL is in the temperature
        assert last.reward.black_box  # type: ignore[attr-defined]


def test_a_first_variation_of_rewards_needs_no_gradient() -> None:
    """Score-as-action, tilt matching and ORW-CFM-W2 take a reward without one; a first variation of scores is refused."""
    detached = {"reward": lambda x: x.detach()[:, 0]}
    short = tiltflow.Training(max_train_steps=2, train_batch_size=16)
    for each in (tiltflow.ScoreAsAction(num_inference_steps=4), tiltflow.TiltMatching(), tiltflow.OrwCfmW2()):
        utility = tiltflow.OfLaw(Superquantile(share=0.25), rewards=detached, num_samples=100)
        *_, stage = tiltflow.stages(normal(), utility, each, short, count=2, base="first", mixing=0.5)
        assert moments(stage.model) != moments(normal())
    for scores, price in ((tiltflow.OfLaw(Entropy(), num_samples=50), 0.0), (utility, 0.1)):
        with pytest.raises(InputError, match="known by its gradient alone, and tilt-matching learns from values"):
            next(tiltflow.stages(normal(), scores, tiltflow.TiltMatching(), short, count=1, price=price))


def test_what_is_known_of_a_model() -> None:
    """Scores and log ratios of N(1, 1) and N(0.7, 0.25), samples of both, rewards at the samples."""
    last, first, x = normal(1.0, 1.0), normal(), torch.linspace(-1, 2, 7)[:, None]
    utility = tiltflow.OfLaw(Sum(utilities=[{"utility": Renyi()}, {"utility": Mmd()}, {"utility": MeanVariance()}]), rewards=X)  # type: ignore[arg-type]
    at = utility.known(last, first, (), seed=3)
    noise = (EPS / (1 - EPS)) ** 2
    assert at.score is not None
    assert at.base_score is not None
    assert at.log_ratio is not None
    assert at.reference is not None
    assert_close(at.score(x), (1 - x) / (1 + noise), rtol=0, atol=1e-3)
    assert_close(at.base_score(x), (MEAN - x) / (VARIANCE + noise), rtol=0, atol=5e-3)
    laws = [torch.distributions.Normal(1.0, 1.0), torch.distributions.Normal(MEAN, VARIANCE**0.5)]
    ours, theirs = (each.log_prob(x[:, 0]).double() for each in laws)
    assert_close(at.log_ratio(x), ours - theirs, rtol=0, atol=0.02)
    assert (at.x.mean() - 1).abs() < 4 / 4000**0.5
    assert (at.reference.mean() - MEAN).abs() < 4 * VARIANCE**0.5 / 4000**0.5
    assert_close(at.rewards["reward"], at.x[:, 0])
    again, other = utility.known(last, first, (), seed=3), utility.known(last, first, (), seed=4)
    assert torch.equal(at.x, again.x)
    assert not torch.equal(at.x, other.x)
    assert not torch.equal(at.x, at.reference)


@pytest.mark.usefixtures("exact")
def test_a_log_ratio_that_only_the_value_needs_is_not_asked_for_in_training() -> None:
    """-KL(N(1, 1) | N(0.7, 0.25)) is known, and its first variation by its gradient alone."""
    utility = tiltflow.OfLaw(Kl(), num_samples=2000)
    at = utility.known(normal(1.0, 1.0), normal(), (), seed=0)
    exact = -((1 + 0.3**2) / VARIANCE - 1 + torch.tensor(VARIANCE).log().item()) / 2
    assert abs(utility.value(at).value - exact) < 4 * utility.value(at).standard_error + 0.02
    assert not utility.first_variation(at).valued


class Classes(nn.Module):
    """N(-1, 0.25) and N(2, 0.25), by class."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return affine.velocity(x, t.reshape(-1, 1), self.mean(labels) + self.shift)  # type: ignore[arg-type]

    @staticmethod
    def mean(labels: Tensor) -> Tensor:
        return torch.tensor([-1.0, 2.0])[labels][:, None]


def test_scores_rewards_and_labels_are_those_of_the_class_of_a_sample() -> None:
    def hit(x: Tensor, labels: Tensor) -> Tensor:
        return (x[:, 0] - Classes.mean(labels)[:, 0]).square()

    def log_odds(x: Tensor) -> Tensor:
        return -(x - torch.tensor([-1.0, 2.0])).square() / (2 * VARIANCE)

    model = tiltflow.Model(Flow(Classes()), (1,), class_names=("low", "high"))
    parts = [{"utility": each} for each in (Entropy(), MeanVariance(), SpreadConditions())]
    utility = tiltflow.OfLaw(Sum(utilities=parts), reward=hit, num_samples=600, log_odds=log_odds)  # type: ignore[arg-type]
    items = outer.items_of(model, None, tiltflow.Training())
    at = utility.known(model, model, items, seed=0)
    assert at.rewards["reward"].mean() == pytest.approx(VARIANCE, rel=0.3)  # of its own class
    assert at.labels is not None
    assert at.labels.tolist() == [0, 1] * 300
    assert at.score is not None
    assert_close(at.score(at.x), (Classes.mean(at.labels) - at.x) / VARIANCE, rtol=0.01, atol=0.03)
    assert SpreadConditions().value(at).value == pytest.approx(torch.tensor(2.0).log().item(), rel=0.02)
    short = tiltflow.Training(max_train_steps=1, train_batch_size=4)
    (stage,) = tiltflow.stages(model, utility, method(1.0), short, count=1)
    assert stage.after is not None


@pytest.mark.usefixtures("exact")
def test_stages_stop_where_the_utility_no_longer_rises() -> None:
    def last(**stop: Any) -> Any:
        utility = tiltflow.OfLaw(Entropy(), num_samples=500)
        return list(tiltflow.stages(normal(), utility, count=9, stop=tiltflow.Stop(**stop), **from_base("last")))[-1]

    small = last(min_rise=0.2)
    assert small.number < 9
    assert small.rise.value < 0.2
    assert small.stopped.startswith(f"the utility rose by {small.rise} in stage {small.number}, less than 0.2")
    quiet = last(patience=2)
    assert 3 < quiet.number < 9
    assert f"did not rise significantly in the 2 stages up to stage {quiet.number}" in quiet.stopped
    enough = small.before.value + small.rise.value / 2  # between those of two stages
    high = last(value=enough)
    assert high.number == small.number > 1
    assert high.before.value < enough <= high.after.value
    assert high.stopped == f"the utility is {high.after} after stage {high.number}, at least {enough:g}"
    assert last().stopped is None


@pytest.mark.parametrize(
    ("rises", "stops"), [([(1, 0.1), (0.1, 0.1)], False), ([(0.1, 0.1), (1, 0.1)], False), ([(0.1, 0.1), (-1, 0.1)], True)]
)
def test_patience_counts_stages_in_a_row(rises: list[tuple[float, float]], stops: bool) -> None:
    assert (tiltflow.Stop(patience=2).reason([Estimate(*each) for each in rises], Estimate(9.0, 0.1)) is not None) == stops


@pytest.mark.usefixtures("exact")
def test_a_utility_adapts_to_the_law_that_a_stage_has_reached() -> None:
    """The multiplier settles at 1.4, where the mean cost x is at its limit, 1, from N(0.7, 0.25) under the reward 2 x; with the
    multiplier of the first stage it would settle at 1.13."""
    rewards = {"reward": lambda x: 2 * x[:, 0], "cost": lambda x: x[:, 0]}
    utility = tiltflow.OfLaw(AugmentedLagrangian(limit=1.0, multiplier=1.0), rewards=rewards, num_samples=2000)
    *_, stage = tiltflow.stages(normal(), utility, method(0.5), count=10, base="first")
    assert moments(stage.model)[0] == pytest.approx(1.0, abs=0.04)


def test_a_law_that_has_no_value_ends_the_loop_only_after_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that goes beyond a barrier gives its model, without a value; the next one says why it cannot begin."""
    monkeypatch.setattr(outer, "tune", lambda *arguments, **options: normal(3.0))
    rewards = {"reward": X["reward"], "cost": X["reward"]}
    found = tiltflow.stages(
        normal(), tiltflow.OfLaw(LogBarrier(limit=2.0), rewards=rewards, num_samples=50), method(1.0), count=2
    )
    stage = next(found)
    assert stage.before is not None
    assert stage.after is None
    assert stage.rise is None
    with pytest.raises(InputError, match="log-barrier"):
        next(found)


def test_what_does_not_fit_is_refused_in_one_line() -> None:
    def attempt(utility: Any, **options: Any) -> None:
        next(tiltflow.stages(normal(), utility, method(1.0), SHORT, count=1, **options))

    tail = tiltflow.OfLaw(Superquantile(), rewards=X, num_samples=50)
    with pytest.raises(InputError, match="superquantile has no reward 'rewrad', did you mean 'reward'"):
        tiltflow.OfLaw(Superquantile(), rewards={"rewrad": X["reward"]})
    with pytest.raises(InputError, match="log-barrier needs a reward for 'cost'"):
        tiltflow.OfLaw(LogBarrier(limit=1.0), reward=X["reward"])
    with pytest.raises(InputError, match="reward and rewards both give 'reward'"):
        tiltflow.OfLaw(Superquantile(), X["reward"], X)
    with pytest.raises(InputError, match="utility must be the settings of one"):
        tiltflow.OfLaw(Superquantile, X["reward"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="base must be 'last' or 'first', is 'frist', did you mean 'first'"):
        attempt(tail, base="frist")
    with pytest.raises(InputError, match="the temperature of the method is the price"):
        attempt(tail, base="first", price=1.0)
    with pytest.raises(InputError, match="mixing is of stages from the first model"):
        attempt(tail, mixing=0.5)
    with pytest.raises(InputError, match="mixing must be above 0"):
        attempt(tail, base="first", mixing=0.0)
    with pytest.raises(InputError, match="stop asks for the value of the utility"):
        attempt(MeanReward(1.0), stop=tiltflow.Stop(patience=1))
    with pytest.raises(InputError, match="utility spread-conditions needs the log densities"):
        attempt(tiltflow.OfLaw(SpreadConditions(), num_samples=50))
    scores, sampled = tiltflow.OfLaw(Entropy(), num_samples=50), tiltflow.Training(calibration_samples=50)
    with pytest.raises(InputError, match=r"training\.calibration_samples asks for values of the reward"):
        next(tiltflow.stages(normal(), scores, method(1.0), sampled, count=1))


# ---- in a folder ----


def in_folder(path: Path | None, base: str = "last", *, resume: bool = True, **options: Any) -> Iterator[Any]:
    """Two light stages for a mean less a variance, at a price."""
    again: dict[str, Any] = {"resume_from_checkpoint": "latest"} if resume and path is not None else {}
    training = tiltflow.Training(max_train_steps=4, train_batch_size=4, checkpointing_steps=2 if path else 50, **again)
    folder = {} if path is None else {"output": path, "evaluation": tiltflow.Evaluation(num_samples=16)}
    given = {"count": 2, **from_base(base, 0.5, steps=3), "optimizer": FAST, **folder, **options}
    utility = tiltflow.OfLaw(MeanVariance(aversion=1.5), rewards=X, num_samples=100)
    return tiltflow.stages(normal(), utility, training=training, **given)


class Killed(Exception):
    pass


@pytest.mark.parametrize("base", ["last", pytest.param("first", marks=pytest.mark.slow)])
def test_stages_resume_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    """Killed in the first stage, between stages and in the second stage."""
    whole = [(moments(stage.model), stage.before, stage.after) for stage in in_folder(None, base)]

    def killed(kept: int, at: int) -> None:
        steps: list[int] = []

        def kill(record: Any) -> None:
            steps.append(record.step)
            if record.step == at:
                raise Killed

        finished: list[Any] = []
        with pytest.raises(Killed):
            finished.extend(in_folder(tmp_path / "out", base, callbacks=[kill]))
        assert len(finished) == kept
        assert steps[0] == 1 + (kept == 0 and at == 4) * 2  # from the checkpoint of step 2

    killed(0, 3)
    killed(0, 4)
    next(iter(in_folder(tmp_path / "out", base)))
    killed(1, 3)
    found = list(in_folder(tmp_path / "out", base))
    assert [(moments(stage.model), stage.before, stage.after) for stage in found] == whole
    monkeypatch.setattr(outer, "tune", None)  # nothing is trained again
    assert [moments(stage.model) for stage in in_folder(tmp_path / "out", base)] == [each[0] for each in whole]
    rows = json.loads((tmp_path / "out" / "stages.json").read_text())["stages"]
    assert [(row["stage"], row["before"], row["after_error"]) for row in rows] == [
        (stage.number, stage.before.value, stage.after.standard_error) for stage in found
    ]
    assert rows[1]["path_kl"] == json.loads((tmp_path / "out" / "stage-02" / "summary.json").read_text())["path_kl"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"from {found[0].before} to {found[1].after}" in page


@pytest.mark.slow
def test_stages_of_a_pipeline_go_on_from_the_pictures_of_the_last_one(tmp_path: Path) -> None:
    """Its finished stages are loaded bit for bit, and the report has their pictures."""
    tiny = tiny_pipeline("stable-diffusion", tmp_path)

    def run(count: int, resume: str | None = None, **folder: Any) -> list[Any]:
        model = tiltflow.from_diffusers(tiny, height=16, width=16)
        training = tiltflow.Training(
            max_train_steps=1, prompts_per_step=1, num_generations=2, guidance_mode="none", resume_from_checkpoint=resume
        )
        utility = tiltflow.OfLaw(MeanVariance(), reward=lambda images: images.mean((1, 2, 3)), num_samples=4)
        prompts: list[Any] = ["a red cat", "a blue dog"]
        found = tiltflow.stages(model, utility, method(1.0), training, count=count, conditions=prompts, **folder)
        return [(stage.after, sum(p.double().sum().item() for p in stage.model.flow.parameters())) for stage in found]

    evaluation = tiltflow.Evaluation(num_prompts=1, num_generations=2)
    folder = {"output": tmp_path / "out", "evaluation": evaluation}
    run(1, **folder)
    assert run(2, "latest", **folder) == run(2) == run(2, "latest", **folder)
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 3


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    assert len(list(in_folder(tmp_path / "out", stop=tiltflow.Stop(min_rise=100.0), resume=False))) == 1
    with pytest.raises(InputError, match="already holds stages; to go on with them"):
        next(iter(in_folder(tmp_path / "out", resume=False)))
    with pytest.raises(InputError, match=r"begun with other settings: price 0.5 -> 0.25"):
        next(iter(in_folder(tmp_path / "out", price=0.25)))
    with pytest.raises(InputError, match=r"begun with other settings: seed 0 -> 1"):
        next(iter(in_folder(tmp_path / "out", seed=1)))
    row = json.loads((tmp_path / "out" / "stages.json").read_text())["stages"][0]
    assert row["stopped"].startswith("the utility rose by")
    next(iter(in_folder(tmp_path / "out")))  # without the rule it goes on
    assert json.loads((tmp_path / "out" / "stages.json").read_text())["stages"][0]["stopped"] is None
    for text, what in (("{}", r"is damaged, or of an earlier version \(KeyError\('settings'\)\)"), ("{", "cannot be read .*")):
        (tmp_path / "out" / "stages.json").write_text(text)
        with pytest.raises(
            InputError, match=what + "; nothing writes it again; the models of the stages are in stage-01/model"
        ):
            next(iter(in_folder(tmp_path / "out")))
        with pytest.raises(InputError, match="nothing writes it again"):
            write_stages_report(tmp_path / "out")
    assert (tmp_path / "out" / "stage-01" / "model" / "model.safetensors").is_file()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(InputError, match="already holds something"):
        next(iter(in_folder(tmp_path / "other")))


def test_the_report_of_a_stage_without_values_gives_no_verdict(tmp_path: Path) -> None:
    training, evaluation = tiltflow.Training(max_train_steps=1, train_batch_size=4), tiltflow.Evaluation(num_samples=16)
    utility = tiltflow.OfLaw(Entropy(), num_samples=50)
    next(tiltflow.stages(normal(), utility, method(1.0), training, count=1, output=tmp_path / "out", evaluation=evaluation))
    summary = json.loads((tmp_path / "out" / "stage-01" / "summary.json").read_text())
    assert "known by its gradient alone" in summary["verdict"]["text"]
    assert summary["reward_target"] is None


def test_a_report_has_a_row_and_a_picture_for_each_stage(tmp_path: Path) -> None:
    rows = []
    for stage in (1, 2):
        folder = tmp_path / f"stage-0{stage}"
        folder.mkdir()
        for side in ("before", "after"):
            (folder / f"{side}.png").write_bytes(f"{side} {stage}".encode())
        estimates = {name: value for key in ("before", "after", "rise") for name, value in ((key, 1.0), (f"{key}_error", 0.1))}
        row = {"stage": stage, "folder": folder.name, **estimates, "path_kl": None, "seconds": 61.0, "stopped": None}
        rows.append(row)
    settings = {"method": {"name": "adjoint-matching"}, "base": "first", "seed": 0, "utility": {"name": "<entropy>"}}
    (tmp_path / "stages.json").write_text(json.dumps({"settings": settings, "stages": rows}))
    page = write_stages_report(tmp_path).read_text()
    shown = [base64.b64decode(data).decode() for data in re.findall(r"base64,([^\"]+)", page)]
    assert shown == ["before 1", "after 1", "after 2"]
    assert page.count("stage-02/report.html") == 1
    assert "<svg" in page
    assert "&lt;entropy&gt;" in page


@pytest.mark.slow
@pytest.mark.parametrize("base", ["last", "first"])
def test_entropy_at_a_price_by_adjoint_matching(base: str) -> None:
    """The variance settles at (1 + alpha) / alpha = 3 times that of the base. From the last model there is nothing left to tune
    at the end, and no error stays. From the first one that of a whole tilt does: a chain of 12 steps makes it too narrow by the
    share d = 0.1, and v = (1 - d) / (q_0 - 1 / (alpha v)) is at 3 - d times that of the base."""
    training = tiltflow.Training(max_train_steps=150, train_batch_size=1024)
    utility = tiltflow.OfLaw(Entropy(), num_samples=200)
    options = from_base(base, mixing=ALPHA / (1 + ALPHA))
    *_, stage = tiltflow.stages(normal(), utility, training=training, count=4, optimizer=FAST, **options)
    mean, variance = moments(stage.model)
    expected = {"last": 3.0, "first": 3.0 - 0.1}[base]
    assert variance / VARIANCE == pytest.approx(expected, abs=0.03)
    assert mean == pytest.approx(MEAN, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_entropy_at_a_price_of_a_perceptron_in_the_plane(alpha: float, tmp_path: Path) -> None:
    """Each coordinate within 3 %, of which the noise of the scores is 0.3 and two errors of 100,000 samples are 0.9. The
    adjoints of explore-entropy are in closed form: a chain of steps would leave the law too narrow."""
    changes = ["stages.count=2", f"stages.price={alpha}", f"method.beta={1 + alpha}", "training.max_train_steps=300"]
    changes += ["model.means=[[0, 0]]", "model.weights=[1]", "model.scale=1"]
    own = read_recipe(read_recipe_tree(find_recipe("explore-entropy", "train"), changes), "plane")
    assert isinstance(own, StagedRecipe)
    run_stages(own, tmp_path / "run")
    x = tiltflow.load(tmp_path / "run").sample(100_000, batch_size=20_000)
    assert x.var(0).tolist() == pytest.approx(2 * [(1 + alpha) / alpha], rel=0.03)


@pytest.mark.slow
def test_mean_variance_at_a_price_by_a_method_without_gradients() -> None:
    """As above, from the first model, by score-as-action with likelihood ratios."""
    score_as_action = tiltflow.ScoreAsAction(beta=ALPHA, num_inference_steps=STEPS)
    utility = tiltflow.OfLaw(MeanVariance(aversion=1.5), rewards={"reward": lambda x: x.detach()[:, 0]}, num_samples=2000)
    training = tiltflow.Training(max_train_steps=150, train_batch_size=128)
    *_, stage = tiltflow.stages(normal(), utility, score_as_action, training, count=5, base="first", mixing=0.5, optimizer=FAST)
    mean, variance = next(islice(mean_variance(1.5, 0.5), 4, None))
    assert moments(stage.model) == [pytest.approx(mean, abs=0.05), pytest.approx(variance, rel=0.15)]
