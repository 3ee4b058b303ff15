"""Path-reweighted flow matching against closed forms: the weights of paths, the shares of proposals, the pool, and its law."""

from __future__ import annotations

import copy
import math
from typing import Any

import affine
import pytest
import torch
from affine import Affine
from tiny import iterate
from torch import Tensor, nn

from tiltflow.control.path_weights import WeightedPaths, draw_paths, log_proposal, relative_sizes
from tiltflow.errors import CollapseError, NonFiniteError
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.laws.chain_optimum import solve, tilted_chain
from tiltflow.laws.gaussian_mixture import QuadraticReward, mixture
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.path_reweighted import LOOK_AGAIN, SHARES, PathReweighted, Pool, State, dealt
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.methods.tilt_matching import TiltMatching
from tiltflow.problems.verification.quadratic_tilt import best_of_chain
from tiltflow.problems.verification.verify import read_verification, verify
from tiltflow.runs.caveats import weights_in_words
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.batch import Batch
from tiltflow.training.method import Stateful
from tiltflow.training.noising import resampled
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.trainer import BatchEnd, train

CHAIN = Sampling(num_inference_steps=12).chain()
BASE = FunctionField(affine.velocity)


def steps_of(chain: Chain) -> Affine:
    """The base's chain on N(0.7, 0.25)."""
    a = affine.slope(chain.times[:-1])
    return Affine(chain.x_scale + chain.v_scale * a, chain.v_scale * affine.MEAN * (1 - a * chain.times[:-1]), chain.std)


def controlled(chain: Chain, slope: Tensor, shift: Tensor) -> FunctionField:
    """The base under the controls w_k(x) = slope_k x + shift_k."""
    at = {t.item(): k for k, t in enumerate(chain.times[:-1])}

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        k = at[t.item()]
        scale = chain.control_scale[k]
        return affine.velocity(x, t) + (0 if scale == 0 else (slope[k] * x + shift[k]) / scale)

    return FunctionField(velocity)


SLOPE, SHIFT = torch.linspace(-0.2, 0.1, 12).double(), torch.linspace(0.3, 0.1, 12).double()
TUNED = controlled(CHAIN, SLOPE, SHIFT)


def paths(size: int, share: float, *, tuned: FunctionField | None = TUNED, seed: int = 0) -> tuple[WeightedPaths, Tensor]:
    """Paths of which the first share is the base's, and log q of each."""
    generator = stream(seed, "paths")
    x = torch.randn(size, 1, generator=generator, dtype=torch.float64)
    of_base = torch.arange(size) < round(share * size)
    found = draw_paths(CHAIN, tuned, BASE, x, of_base, generator)
    return found, torch.zeros(size) if tuned is None else log_proposal(found.log_ratio, torch.tensor(share))


def tilted(linear: float, quadratic: float) -> tuple[float, float]:
    """The law of the base chain's own ends, tilted by exp(linear x - quadratic x^2 / 2)."""
    mean, variance = (each.item() for each in steps_of(CHAIN).law())
    narrower = 1 / (1 / variance + quadratic)
    return narrower * (mean / variance + linear), narrower


def best_for(c: float) -> FunctionField:
    """The optimal control for exp(c x): w_k = s_k c prod_{j > k} gain_j."""
    base = steps_of(CHAIN)
    later = torch.cat([base.gain.flip(0).cumprod(0).flip(0)[1:], torch.ones(1).double()])
    return controlled(CHAIN, torch.zeros(12).double(), base.std * c * later)


# ---- the weights ----


@pytest.mark.parametrize("of_base", [True, False])
def test_the_log_ratio_is_that_of_the_gaussian_densities_of_the_steps(of_base: bool) -> None:
    states: list[Tensor] = []

    def seen(x: Tensor, t: Tensor) -> Tensor:
        states.append(x)
        return affine.velocity(x, t)

    generator = stream(0, "paths")
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    found = draw_paths(CHAIN, TUNED, FunctionField(seen), x, torch.full((50,), of_base), generator)
    states.append(found.ends)
    expected, costs = torch.zeros(50).double(), torch.zeros(50).double()
    for k, t in enumerate(CHAIN.times[:-2]):  # the last step has no noise
        before, after = states[k], states[k + 1]
        ours, theirs = (
            torch.distributions.Normal(CHAIN.mean(k, before, field(before, t)), CHAIN.std[k]) for field in (TUNED, BASE)
        )
        expected += (ours.log_prob(after) - theirs.log_prob(after)).sum(1)
        costs += torch.distributions.kl_divergence(ours, theirs).sum(1)
    assert CHAIN.std[-1] == 0
    assert found.log_ratio is not None
    torch.testing.assert_close(found.log_ratio, expected)
    torch.testing.assert_close(found.costs, costs)
    last = CHAIN.mean(11, states[-2], affine.velocity(states[-2], CHAIN.times[11]))
    torch.testing.assert_close(found.ends, last)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_weighted_ends_are_the_tilt_of_the_base_chains_own_law(share: float) -> None:
    found, log_q = paths(40_000, share)
    x = found.ends[:, 0]
    for logs, law in (
        (-log_q, tilted(0, 0)),
        (0.9 * x - 0.4 * x**2 - log_q, tilted(0.9, 0.8)),
    ):
        weights = logs.exp()
        mean, variance = law
        for values, exact in ((x, mean), ((x - mean) ** 2, variance)):
            error = (weights * (values - exact)).std() / weights.mean() / 40_000**0.5
            assert abs((weights * (values - exact)).mean() / weights.mean()) < 4 * error
            assert error < 0.02
    # the density of what was drawn has mass one under the base
    one = (-log_q).exp()
    assert abs(one.mean() - 1) < 4 * one.std() / 40_000**0.5 + 1e-12


def test_the_mean_of_the_costs_is_the_path_kl() -> None:
    found, _ = paths(40_000, 0.0)
    inner = steps_of(CHAIN)
    whole = Affine(inner.gain[:-1], inner.offset[:-1], inner.std[:-1]).path_kl(SLOPE[:-1], SHIFT[:-1])
    assert abs(found.costs.mean() - whole) < 4 * found.costs.std() / 200
    assert found.log_ratio is not None
    assert abs(found.log_ratio.mean() - whole) < 4 * found.log_ratio.std() / 200


def test_at_the_optimum_of_a_linear_reward_all_weights_are_equal() -> None:
    """The tilt shifts every step, and exp(c x) is the ratio of the paths. The first step forgets the start, and the last has no
    noise."""
    c, (mean, variance) = 1.3, steps_of(CHAIN).law()
    found, log_q = paths(200, 0.0, tuned=best_for(c))
    logs = c * found.ends[:, 0] - log_q
    torch.testing.assert_close(logs, torch.full_like(logs, (c * mean + c**2 * variance / 2).item()), rtol=1e-9, atol=1e-9)


def test_a_share_of_the_base_bounds_the_weights() -> None:
    _, log_q = paths(2000, 0.25)
    assert ((-log_q).exp() <= 4 + 1e-9).all()
    _, alone = paths(2000, 1.0, tuned=None)
    assert (alone == 0).all()
    assert paths(10, 1.0, tuned=None)[0].log_ratio is None


def test_the_size_that_a_round_would_have_is_the_one_that_it_has() -> None:
    """Estimated from half and half, against closed forms, and, of the share that was drawn, against the weights themselves."""
    c = 0.8
    found, log_q = paths(100_000, 0.5)
    assert found.log_ratio is not None
    log_tilt = c * found.ends[:, 0]
    everything = [torch.arange(100_000)]
    sizes = relative_sizes(log_tilt, found.log_ratio, log_q, (0.0, 0.5, 1.0), everything)
    own = ImportanceWeights.from_log_tilt(log_tilt - log_q).effective_sample_size / 100_000
    assert sizes[1].item() == pytest.approx(own)
    _, variance = steps_of(CHAIN).law()
    assert sizes[2].item() == pytest.approx(math.exp(-(c**2) * variance), abs=0.01)
    fresh, alone = paths(100_000, 0.0, seed=1)
    of_tuned = ImportanceWeights.from_log_tilt(c * fresh.ends[:, 0] - alone).effective_sample_size / 100_000
    assert sizes[0].item() == pytest.approx(of_tuned, abs=0.01)


def test_the_size_of_several_groups_is_their_harmonic_mean_whatever_their_constants() -> None:
    found, log_q = paths(600, 0.5)
    assert found.log_ratio is not None
    log_tilt = found.ends[:, 0]
    halves = [torch.arange(0, 600, 2), torch.arange(1, 600, 2)]
    one, other = (
        relative_sizes(log_tilt[half], found.log_ratio[half], log_q[half], SHARES, [torch.arange(300)]) for half in halves
    )
    shifted = log_tilt.clone()
    shifted[halves[1]] += 5.0
    both = relative_sizes(shifted, found.log_ratio, log_q, SHARES, halves)
    torch.testing.assert_close(both, 2 / (1 / one + 1 / other))


# ---- what is left: the law of the base's own chain ----


def test_what_is_left_on_one_gaussian_is_the_error_of_the_base_chain() -> None:
    base = mixture(torch.tensor([[affine.MEAN]]).double(), (1.0,), affine.VARIANCE**0.5)
    reward = QuadraticReward(torch.tensor([0.45]).double(), 0.4)
    found = tilted_chain(CHAIN, base, reward, 0.5)
    points, probabilities = (torch.from_numpy(each) for each in (found.axes[0], found.weights))
    mean = probabilities @ points
    assert (mean.item(), (probabilities @ (points - mean) ** 2).item()) == pytest.approx(tilted(0.9, 0.8), abs=1e-6)
    exact = tilted(0.9, 0.8)
    assert found.reward == pytest.approx(0.45 * exact[0] - 0.2 * (exact[0] ** 2 + exact[1]), abs=1e-6)
    ours, theirs = (torch.distributions.Normal(m, v**0.5) for m, v in (exact, tilted(0, 0)))
    assert found.path_kl == pytest.approx(torch.distributions.kl_divergence(ours, theirs).item(), abs=1e-5)


@pytest.mark.parametrize(("steps", "left", "of_control"), [(15, 0.0484, 0.2324), (40, 0.0186, 0.112)])
def test_what_is_left_on_two_modes_is_a_fifth_of_what_the_best_control_leaves(
    steps: int, left: float, of_control: float
) -> None:
    base = mixture(torch.tensor([[-1.5], [1.5]]).double(), (0.6, 0.4), (0.15**0.5, 0.3**0.5))
    reward = QuadraticReward(torch.tensor([0.8]).double(), 0.7)
    found = best_of_chain(PathReweighted(num_inference_steps=steps, path_steps=steps, paths="sampler"), base, reward, 0.6)[
        "chain_optimum"
    ]
    assert found["distance"] == pytest.approx(left, abs=1e-4)
    assert found["num_inference_steps"] == steps
    chain = Sampling(num_inference_steps=steps).chain()
    control = solve(chain, chain.energy, base, reward, 0.6)
    assert control.sliced_w2(base.tilt(reward, 0.6)) == pytest.approx(of_control, abs=1e-3)


# ---- rounds ----


def drawn(size: int, method: PathReweighted, state: State, tuned: Any, reward: Any, **options: Any) -> tuple[Pool, Any]:
    generator = stream(state.rounds, "round")
    x = torch.randn(size, 1, generator=generator, dtype=torch.float64)
    return method._draw(Batch(x, tuned, BASE, reward, generator, **options), state)


def linear(x: Tensor) -> Tensor:
    return x[:, 0]


BAD = controlled(CHAIN, torch.zeros(12).double(), torch.full((12,), -0.5).double())


@pytest.mark.parametrize(("tuned", "best"), [(BAD, 1.0), (best_for(0.35), 0.0)])
def test_the_proposal_is_what_leaves_more_samples(tuned: FunctionField, best: float) -> None:
    method, state = PathReweighted(num_inference_steps=12, path_steps=12, paths="sampler", beta=2.5), State()
    _, measured = drawn(2000, method, state, tuned, linear)
    assert measured["base_share"] == 0.5
    assert state.share == best
    base, of_tuned = measured["relative_size_of_base"], measured["relative_size_of_tuned"]
    assert base == pytest.approx(math.exp(-(0.4**2) * steps_of(CHAIN).law()[1].item()), abs=0.03)  # of exp(0.4 x)
    assert (base > of_tuned) == (best == 1)
    again, measured = drawn(2000, method, state, tuned, linear)
    assert measured["base_share"] == best
    sizes = {name: value for name, value in measured.items() if name.startswith("relative_size_of")}
    assert sizes == {} if best == 1 else sizes["relative_size_of_tuned"] == pytest.approx(of_tuned, abs=0.1)
    assert ("path_kl" in measured) == (best == 0)
    assert len(again) == 2000


def test_a_run_on_the_base_alone_looks_at_the_tuned_chain_again() -> None:
    method, state = PathReweighted(num_inference_steps=12, path_steps=12, paths="sampler", beta=2.5), State()
    shares = [drawn(64, method, state, BAD, linear)[1]["base_share"] for _ in range(2 * LOOK_AGAIN + 1)]
    assert shares[0] == 0.5
    assert [i for i, share in enumerate(shares) if share < 1] == [0, LOOK_AGAIN, 2 * LOOK_AGAIN]
    assert shares[LOOK_AGAIN] == SHARES[-2]


@pytest.mark.parametrize(("proposal", "share"), [("base", 1.0), ("tuned", 0.0), ("mixture", 0.5)])
def test_a_proposal_that_is_asked_for_is_kept(proposal: Any, share: float) -> None:
    method, state = PathReweighted(num_inference_steps=12, path_steps=12, paths="sampler", proposal=proposal), State()
    found = [drawn(64, method, state, BAD, linear)[1]["base_share"] for _ in range(3)]
    assert found[0] == share
    assert found[1:] == [0.875] * 2 if proposal == "mixture" else [share] * 2


def test_shares_are_dealt_in_each_group() -> None:
    members = [torch.tensor([0, 2, 4, 6, 8]), torch.tensor([1, 3, 5, 7]), torch.tensor([9])]
    of_base, shares = dealt(members, 0.5, stream(0, "deal"))
    assert [int(of_base[group].sum()) for group in members] == [2, 2, 0]
    assert [set(shares[group].tolist()) for group in members] == [{0.4}, {0.5}, {0.0}]
    assert not torch.equal(of_base, dealt(members, 0.5, stream(1, "deal"))[0])


def pool_of(rewards: list[float], log_drawn: list[float] | None = None, condition: Any = None) -> Pool:
    values = torch.tensor(rewards, dtype=torch.float64)
    logs = torch.zeros(len(values)).double() if log_drawn is None else torch.tensor(log_drawn).double()
    return Pool(torch.arange(len(values)).double()[:, None], values, logs, condition)


def test_weights_of_several_rounds_are_of_one_law_and_normalised_in_each_group() -> None:
    method = PathReweighted(beta=0.5, min_effective_sample_size=1)
    pool = pool_of([0.1, 0.4, 0.3, 0.2, 0.9], [0.0, 0.5, -0.3, 0.2, 0.0])
    weights, measured = method._weights(pool, [torch.tensor([0, 1, 3]), torch.tensor([2, 4])], 1)
    raw = (2 * pool.rewards - pool.log_drawn).exp()
    one, other = raw[[0, 1, 3]], raw[[2, 4]]
    expected = torch.empty(5).double()
    expected[[0, 1, 3]], expected[[2, 4]] = 0.6 * one / one.sum(), 0.4 * other / other.sum()
    torch.testing.assert_close(weights, expected)
    assert measured["effective_sample_size"] == pytest.approx(1 / expected.square().sum().item())
    assert measured["relative_size"] == pytest.approx(0.2 / expected.square().sum().item())
    assert measured["largest_weight"] == pytest.approx(5 * expected.max().item())
    assert measured["reward"] == pytest.approx((expected @ pool.rewards).item())
    spread = expected @ pool.rewards**2 - (expected @ pool.rewards) ** 2
    assert measured["reward_std"] == pytest.approx(spread.item() ** 0.5)
    kl = 0.6 * (2 * (one @ pool.rewards[[0, 1, 3]]) / one.sum() - one.mean().log())
    kl += 0.4 * (2 * (other @ pool.rewards[[2, 4]]) / other.sum() - other.mean().log())
    assert measured["kl"] == pytest.approx(kl.item())


def test_the_kl_of_the_weights_is_that_of_the_tilt() -> None:
    found, log_q = paths(40_000, 0.3)
    method = PathReweighted(beta=1.25)
    pool = Pool(found.ends, found.ends[:, 0], log_q, None)
    _, measured = method._weights(pool, [torch.arange(40_000)], 1)
    _, variance = steps_of(CHAIN).law()
    assert measured["kl"] == pytest.approx(0.8**2 * variance.item() / 2, abs=0.01)


def test_the_pool_keeps_the_latest_paths_and_their_conditions() -> None:
    one = pool_of([1, 2, 3], condition=torch.tensor([7, 8, 9]))
    two = pool_of([4, 5], condition=torch.tensor([10, 11]))
    both = one.then(two, 4)
    assert both.rewards.tolist() == [2, 3, 4, 5]
    assert both.condition.tolist() == [8, 9, 10, 11]
    assert both.ends[:, 0].tolist() == [1, 2, 0, 1]
    assert one.then(two, 1).rewards.tolist() == [4, 5]
    prompts = pool_of([6, 7], condition={"embeds": torch.zeros(2, 5), "guidance": 3.5})
    longer = pool_of([8], condition={"embeds": torch.zeros(1, 6), "guidance": 3.5})
    assert prompts.then(prompts, 9).condition["embeds"].shape == (4, 5)
    assert prompts.then(prompts, 9).condition["guidance"] == 3.5
    assert prompts.then(longer, 9).rewards.tolist() == [8]  # nothing would tell a network what was added to the shorter ones
    of_five, of_six = ({"embeds": torch.ones(n, n + 1), "mask": torch.ones(n, n + 1)} for n in (4, 5))
    masked = pool_of([6, 7, 8, 9], condition=of_five).then(pool_of([1, 2, 3, 4, 5], condition=of_six), 9)
    assert masked.rewards.tolist() == [6, 7, 8, 9, 1, 2, 3, 4, 5]
    assert masked.condition["mask"].sum(1).tolist() == 4 * [5] + 5 * [6]
    assert one.then(pool_of([6], condition=torch.zeros(1, 2)), 9).rewards.tolist() == [6]


def test_systematic_resampling_has_the_right_mean_and_no_more_spread_than_rounding() -> None:
    weights = torch.tensor([0.5, 0.0, 0.125, 0.375])
    counts = torch.stack([torch.bincount(resampled(weights, 10, stream(i, "r")), minlength=4) for i in range(400)]).double()
    assert (counts.sum(1) == 10).all()
    assert (counts - 10 * weights).abs().max() < 1
    assert (counts.mean(0) - 10 * weights).abs().max() < 4 * 0.5 / 20
    order = resampled(torch.ones(50), 50, stream(0, "r"))
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() != sorted(order.tolist())


# ---- the regression, and the law ----


class Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.value.expand_as(x)


@pytest.mark.parametrize("neighbours", [1, 100])
def test_the_gradient_of_the_loss(neighbours: int) -> None:
    """At v = c: 2 (c - E_w[x_1]), as noise has mean zero, however many samples are seen together."""
    flow = Flow(Constant(0.3))
    pool, weights = torch.tensor([[2.0], [-1.0], [0.5]]), torch.tensor([0.5, 0.2, 0.3])
    batch = Batch(torch.zeros(20_000, 1), flow, flow, linear, stream(0, "gradient"))
    measured = PathReweighted(neighbours=neighbours)._regress(batch, flow, pool, weights, [torch.arange(3)])
    (value,) = flow.parameters()
    assert value.grad is not None
    assert value.grad.item() == pytest.approx(2 * (0.3 - 0.95), abs=4 * 2 * 1.5 / 20_000**0.5)
    # |c - x_1 + x_0|^2, of a single sample
    spread = float(weights @ (pool[:, 0] - 0.3) ** 2)
    if neighbours == 1:
        assert measured["loss"] == pytest.approx(1 + spread, abs=0.1)
    else:
        assert measured["loss"] < 0.8 * (1 + spread)


def test_the_loss_is_a_mean_over_the_numbers_of_a_sample() -> None:
    """At v = c, for noise and samples of two numbers that are alike: that of one of them."""
    flow = Flow(Constant(0.3))
    pool, weights = torch.tensor([[2.0, 2.0], [-1.0, -1.0]]), torch.tensor([0.5, 0.5])
    batch = Batch(torch.zeros(20_000, 2), flow, flow, linear, stream(0, "gradient"))
    measured = PathReweighted(neighbours=1)._regress(batch, flow, pool, weights, [torch.arange(2)])
    assert measured["loss"] == pytest.approx(1 + (1.7**2 + 1.3**2) / 2, abs=0.1)


class Shifted(nn.Module):
    """The field of N(mean, 0.25); the mean is the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(affine.MEAN))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = time[:, None]
        return self.mean + affine.slope(t) * (x - t * self.mean)


SHORT: dict[str, Any] = {"num_inference_steps": 8, "path_steps": 16, "num_passes": 3, "beta": 0.5}
OPTIMIZER = Optimizer(learning_rate=2e-2, lr_warmup_steps=0, lr_scheduler="cosine", max_grad_norm=None, adam_beta2=0.95)


def trained(method: PathReweighted, steps: int, size: int = 256, **options: Any) -> tuple[Flow, list[Any]]:
    tuned, base = Flow(Shifted()), Flow(Shifted())
    for parameter in base.parameters():
        parameter.requires_grad_(requires_grad=False)
    records = list(
        train(
            tuned,
            base,
            method,
            linear,
            lambda generator: torch.randn(size, 1, generator=generator),
            max_train_steps=steps,
            optimizer=OPTIMIZER,
            ema_decay=0.9,
            **options,
        )
    )
    return tuned, records


@pytest.mark.slow
@pytest.mark.parametrize("first", [None, "adjoint-matching"])
def test_training_reaches_the_tilt(first: Any) -> None:
    """N(0.7, 0.25) under r = x at beta = 0.5 is N(1.2, 0.25)."""
    tuned, records = trained(PathReweighted(**SHORT, first=first, first_steps=30), 120)
    (mean,) = tuned.parameters()
    paths_kept = 256 * 30
    assert mean.item() == pytest.approx(affine.MEAN + affine.VARIANCE / 0.5, abs=4 * 0.5 / paths_kept**0.5 + 0.01)
    assert records[-1].metrics["kl"] == pytest.approx(0.5, abs=0.1)
    assert [("kl" in record.metrics) for record in records[:31]] == [first is None] * 30 + [True]
    assert records[-1].metrics["relative_size_of_tuned"] > records[-1].metrics["relative_size_of_base"]
    assert records[-1].metrics["base_share"] <= SHARES[1]  # ends of 16 steps have not forgotten all of their starts


@pytest.mark.parametrize(
    ("first", "at"),
    [
        *(({"name": "score-as-action", "estimator": "return", "num_passes": 2}, at) for at in (2, 4, 7)),
        *(({"name": "tilt-matching", "num_inference_steps": 2, "num_passes": 2}, at) for at in (2, 4)),
    ],
)
def test_training_resumes_bit_for_bit_in_the_first_method_between_and_in_the_rounds(first: dict[str, Any], at: int) -> None:
    method = PathReweighted(**SHORT, first=first, first_steps=4, pool_size=40)
    states: dict[int, Any] = {}

    def keep(end: BatchEnd) -> None:
        states[end.step] = copy.deepcopy(end.state())

    whole, records = trained(method, 13, 16, on_batch_end=keep)
    assert sorted(states) == [2, 4, 7, 10, 13]
    assert len(states[13]["method"]["pool"]["rewards"]) == 40
    again, rest = trained(method, 13, 16, resume_from=states[at])
    assert [p.item() for p in whole.parameters()] == [p.item() for p in again.parameters()]
    assert [record.metrics for record in records[at:]] == [record.metrics for record in rest]
    assert isinstance(State(), Stateful)


class Labelled(nn.Module):
    """The field of N(mean of the label, 0.25)."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.tensor([affine.MEAN, -affine.MEAN]))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        t, mean = time[:, None], self.means[label][:, None]
        return mean + affine.slope(t) * (x - t * mean)


def test_each_class_has_its_own_law() -> None:
    """Rewards of a class that are larger by a constant leave no trace."""
    tuned, base = Flow(Labelled()), Flow(Labelled())
    method, state = PathReweighted(**SHORT, regression_batch_size=4000), State()
    labels = torch.tensor([0, 1, 1, 1]).repeat(500)

    def reward(x: Tensor) -> Tensor:
        return x[:, 0] + 3.0 * labels

    generator = stream(0, "classes")
    x = torch.randn(2000, 1, generator=generator)
    flows = (flow.bind(labels) for flow in (tuned, base))
    measured = next(iterate(method, *flows, reward, x, generator, state, step=1, max_train_steps=1))
    assert measured["kl"] == pytest.approx(0.5, abs=0.1)
    weights, _ = method._weights(state.pool, [labels.eq(0).nonzero()[:, 0], labels.eq(1).nonzero()[:, 0]], 1)
    assert weights[labels == 0].sum().item() == pytest.approx(0.25)
    (means,) = tuned.parameters()
    assert means.grad is not None
    # both are pulled up, the second class by three times as many samples
    assert means.grad[1] / means.grad[0] == pytest.approx(3, abs=0.6)
    assert means.grad[0] < 0


# ---- what cannot be learned from ----


def test_weights_that_rest_on_one_path_stop_with_what_would_help() -> None:
    pool = pool_of([0.0] * 99 + [80.0])
    with pytest.raises(
        CollapseError, match=r"round 3: the weights of 100 paths rest on 1.0 of them .largest 100 times"
    ) as told:
        PathReweighted(num_inference_steps=15)._weights(pool, [torch.arange(100)], 3)
    for help_ in ("method.beta (1)", "train_batch_size", "num_inference_steps 15", "method.first", "tilt-matching"):
        assert help_ in str(told.value)
    exactly = PathReweighted(min_effective_sample_size=4)  # is enough
    exactly._weights(pool_of([1.0] * 4), [torch.arange(4)], 3)
    two = pool_of([0.0] * 98 + [80.0] * 2)
    weights, _ = PathReweighted(min_effective_sample_size=1.99)._weights(two, [torch.arange(100)], 3)
    assert weights[98:].sum().item() == pytest.approx(1)


def test_rewards_that_overflow_are_weighted_in_log_space() -> None:
    weights, measured = PathReweighted(min_effective_sample_size=1)._weights(pool_of([1e30, 1e30, 0.0]), [torch.arange(3)], 1)
    assert weights.tolist() == [0.5, 0.5, 0.0]
    assert measured["effective_sample_size"] == 2


@pytest.mark.parametrize("log_drawn", [-math.inf, math.nan])
def test_weights_that_are_not_finite_are_one_line(log_drawn: float) -> None:
    with pytest.raises(NonFiniteError, match=r"round 2: the weights of 1 of 3 paths are not finite: has the tuned model div"):
        PathReweighted()._weights(pool_of([0.0, 1.0, 2.0], [0.0, log_drawn, 0.0]), [torch.arange(3)], 2)


def test_paths_without_a_finite_reward_are_left_out_and_a_round_without_any_stops() -> None:
    method, state = PathReweighted(num_inference_steps=12, path_steps=12, paths="sampler"), State()

    def some(x: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x)) % 2 == 0, x[:, 0], torch.nan)

    kept, measured = drawn(100, method, state, TUNED, some, non_finite="drop")
    assert len(kept) == len(kept.ends) == len(kept.log_drawn) == 50
    assert measured["dropped"] == 50
    with pytest.raises(NonFiniteError, match="the reward is not finite for 100 of 100 samples: too few are left"):
        drawn(100, method, state, TUNED, lambda x: x[:, 0] * torch.nan, non_finite="drop")
    assert state.rounds == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_inference_steps": 1}, "greater than or equal to 2"),
        ({"first": "orw-cfm-w2"}, "first must be another method with a beta, such as adjoint-matching"),
        ({"first": "path-reweighted"}, "first must be another method with a beta"),
        ({"first": {"name": "adjoint-matching", "beta": 2}}, "first.beta is 2 and beta 1: leave the first one out"),
        ({"first_steps": 0}, "greater than 0"),
        ({"solver": "heun"}, "must be a memoryless solver"),
    ],
)
def test_settings_that_cannot_work_are_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PathReweighted(**settings)


def test_the_first_method_has_our_temperature_and_steps_unless_it_is_given_its_own_steps() -> None:
    one = PathReweighted(beta=0.2, num_inference_steps=15, first="adjoint-matching")
    assert (one.opening.beta, one.opening.num_inference_steps) == (0.2, 15)
    other = PathReweighted(beta=0.2, num_inference_steps=15, first=AdjointMatching(num_inference_steps=20))
    assert (other.opening.beta, other.opening.num_inference_steps) == (0.2, 20)
    assert one.model_copy(update={"beta": 0.1}).opening.beta == 0.1
    third = PathReweighted(beta=0.2, num_inference_steps=15, first=TiltMatching(num_passes=3))
    assert (third.opening.beta, third.opening.num_inference_steps, third.opening.num_passes) == (0.2, 15, 3)
    assert PathReweighted.model_validate(one.model_dump()) == one
    assert PathReweighted().opening is None


def test_what_is_needed_is_what_the_first_method_needs() -> None:
    assert not PathReweighted().needs.reward_gradient
    assert PathReweighted().needs.passes == 16
    assert PathReweighted(first="adjoint-matching").needs.reward_gradient
    assert not PathReweighted(first="tilt-matching").needs.reward_gradient
    assert PathReweighted(first="tilt-matching").needs.begins_as_base
    assert PathReweighted(first="tilt-matching").needs.batches_kept == TiltMatching().replay
    assert not PathReweighted(first=ScoreAsAction()).needs.begins_as_base
    black_box = PathReweighted(first=ScoreAsAction())
    own = ScoreAsAction().needs
    assert black_box.needs.critic_of_condition == own.critic_of_condition
    assert (black_box.needs.passes, black_box.needs.warmup_steps) == (own.passes, own.warmup_steps)
    assert "always 1" in str(PathReweighted().learns_nothing(1))
    assert PathReweighted().learns_nothing(2) is None
    preset = PathReweighted(first={"name": "adjoint-matching", "preset": "paper"})
    assert preset.optimizer_defaults == AdjointMatching(preset="paper").optimizer_defaults
    assert PathReweighted().optimizer_defaults == {}


def test_paths_have_at_least_their_steps_and_those_of_the_sampler_among_them() -> None:
    method = PathReweighted(num_inference_steps=15, path_steps=40)
    assert len(method.chain()) == 45
    torch.testing.assert_close(method.chain().times[::3], method.sampling.chain().times)
    assert len(PathReweighted(num_inference_steps=50, path_steps=40).chain()) == 50
    assert method.target(10).beta == 1


def test_the_caveat_is_of_the_order_of_the_paths_and_of_their_number() -> None:
    """In 64 dimensions 100 steps of the sampler's own kind left a reward 0.02 short, and a distance of four times the floor."""
    ((heun,), (own,)) = (
        PathReweighted(num_inference_steps=15, paths=paths).target(10).caveats for paths in ("heun", "sampler")
    )
    assert "its own chain of 30 steps: an error of the order of the square of a step stays" in heun
    assert (
        "its own chain of 30 steps: an error of the order of a step, and the larger the more dimensions there are, stays" in own
    )
    chain = PathReweighted(num_inference_steps=15, paths="sampler").chain()
    torch.testing.assert_close(chain.v_scale, Sampling(num_inference_steps=30).chain().v_scale)


def test_the_first_method_lasts_a_share_of_the_run_or_a_number_of_steps() -> None:
    def lasts(steps: float, total: int) -> int:
        method = PathReweighted(first="adjoint-matching", first_steps=steps)
        batches = (
            Batch(torch.zeros(1, 1), BASE, BASE, linear, torch.Generator(), step=i, max_train_steps=total) for i in range(total)
        )
        return sum(map(method.is_first, batches))

    assert [lasts(steps, 20) for steps in (0.25, 0.5, 1, 7, 30)] == [5, 10, 1, 7, 20]
    assert not PathReweighted().is_first(Batch(torch.zeros(1, 1), BASE, BASE, linear, torch.Generator()))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [15, 40])
def test_two_modes_are_reached_by_the_ode(steps: int) -> None:
    """The mixture of `docs/exactness.md`: the best control of a chain of 15 steps is at .232, of 40 at .112."""
    two = ["dimension=1", "means=[[-1.5],[1.5]]", "weights=[.6,.4]", "scale=[.3873,.5477]", "linear=0.8", "quadratic=0.7"]
    found = verify(read_verification("mixture", "path-reweighted", [*two, "beta=0.6", f"num_inference_steps={steps}"]))
    assert found.values["distance_ode"] < 0.04
    assert found.values["network_evaluations"] < 27e6


def test_a_run_says_when_it_learned_from_few_samples() -> None:
    (said,) = weights_in_words({"effective_sample_size": 12.4, "relative_size": 0.002})
    assert "were worth 12 equally weighted ones, 0.2% of their number" in said
    assert len(weights_in_words({"effective_sample_size": 500.0, "relative_size": 0.049})) == 1
    assert len(weights_in_words({"effective_sample_size": 99.0, "relative_size": 0.9})) == 1
    assert weights_in_words({"effective_sample_size": 100.0, "relative_size": 0.05}) == []
    assert weights_in_words({"effective_sample_size": 2.0}) == []
    assert weights_in_words({"loss": 1.0}) == []
