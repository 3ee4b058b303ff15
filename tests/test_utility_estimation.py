"""What utilities share: tails of weighted samples, pools of tails, scores of fields, first variations as rewards."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.tails import best_share, worst_share
from tiltflow.flows.field import FunctionField
from tiltflow.rewards.functions.checked import value_and_gradient
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.rewards.functions.prompted import given
from tiltflow.utilities.estimation.first_variation import FirstVariation, Surrogate, of_rewards, of_samples
from tiltflow.utilities.estimation.known import Known, spread_of_mean
from tiltflow.utilities.estimation.scores import Score
from tiltflow.utilities.estimation.tail_pool import tail_pool


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- tails ----


def test_the_mean_of_the_best_share() -> None:
    """With m = share n and k = floor(m): (sum of the k largest + (m - k) times the next) / m. And the threshold is the next:
    with it as t, t + E (r - t)+ / share is the mean."""
    r = torch.randn(37, generator=generator(), dtype=torch.float64)
    p = torch.full((37,), 1 / 37, dtype=torch.float64)
    ordered = r.sort(descending=True).values
    for share in (1 / 37, 0.05, 0.1, 10 / 37, 0.5, 0.99):
        m = share * 37
        k = math.floor(m + 1e-9)
        expected = (ordered[:k].sum() + (m - k) * ordered[k]) / m
        mean, threshold = best_share(r, p, share)
        assert mean == pytest.approx(float(expected), rel=1e-12)
        assert threshold == ordered[k]
        assert threshold + float(p @ (r - threshold).clamp(min=0)) / share == pytest.approx(mean, rel=1e-12)
        mean, threshold = worst_share(-r, p, share)
        assert mean == pytest.approx(-float(expected), rel=1e-12)
        assert threshold == -ordered[k]
    assert best_share(r, p, 1.0) == (pytest.approx(float(r.mean()), rel=1e-12), ordered[-1])


def test_weights_are_repetitions() -> None:
    values = torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    times = torch.tensor([1.0, 4.0, 3.0, 2.0], dtype=torch.float64)
    repeated = values.repeat_interleave(times.long())
    for share in (0.15, 0.3, 0.45, 0.8):
        expected = best_share(repeated, torch.full((10,), 0.1, dtype=torch.float64), share)
        assert best_share(values, times / 10, share) == pytest.approx(expected, rel=1e-6)


# ---- pools ----


def test_a_pool_keeps_strata_with_their_weights() -> None:
    rewards = torch.arange(100.0)
    pool = tail_pool(rewards, 89.5, tail=5, body=20, generator=generator())
    inside = rewards[pool.which] > 89.5
    assert int(inside.sum()) == 5
    assert len(pool.which.unique()) == 25
    assert pool.weights[inside].tolist() == [10 / (100 * 5)] * 5
    assert pool.weights[~inside].tolist() == [90 / (100 * 20)] * 20
    whole = tail_pool(rewards, 10.0, tail=50, body=1000, generator=generator(), best=False)
    assert int((rewards[whole.which] < 10).sum()) == 10
    assert whole.weights.sum().item() == pytest.approx(1)
    assert set(whole.which.tolist()) == set(range(100))


def test_every_sample_of_a_stratum_is_as_likely_to_be_kept() -> None:
    """So the weighted mean is unbiased: over draws, the mean of a function of six samples is its mean, by a z-test; and all
    pairs of the tail come."""
    rewards = torch.tensor([5.0, 1.0, 4.0, 6.0, 0.0, 2.0])
    values = torch.tensor([1.0, -3.0, 10.0, 2.0, 7.0, 0.4], dtype=torch.float64)
    draws, pairs = [], set()
    for seed in range(600):
        pool = tail_pool(rewards, 3.0, tail=2, body=1, generator=generator(seed))
        draws.append(float(pool.weights @ values[pool.which]))
        pairs.add(tuple(sorted(pool.which[:2].tolist())))
    assert pairs == set(itertools.combinations((0, 2, 3), 2))
    assert np.mean(draws) == pytest.approx(float(values.mean()), abs=4 * np.std(draws) / 600**0.5)


def test_a_tail_without_samples() -> None:
    with pytest.raises(InputError, match="none of 3 rewards is above 2; the highest is 2"):
        tail_pool(torch.arange(3.0), 2.0, tail=1, body=1, generator=generator())
    with pytest.raises(InputError, match="none of 3 rewards is below 0; the lowest is 0"):
        tail_pool(torch.arange(3.0), 0.0, tail=1, body=1, generator=generator(), best=False)


def test_the_error_from_a_pool_is_an_upper_bound_that_is_near() -> None:
    """For a mean over the tail, where most of the variance is."""
    values, errors = [], []
    for seed in range(200):
        r = torch.randn(2000, generator=generator(seed), dtype=torch.float64)
        pool = tail_pool(r, 1.645, tail=60, body=60, generator=generator(1000 + seed))
        known = Known(r[pool.which, None], weights=pool.weights)
        tail = (known.x[:, 0] - 1.645).clamp(min=0)
        found = known.estimate(known.mean(tail), tail)
        values.append(found.value)
        errors.append(found.standard_error)
    # E (z - 1.645)+ = phi(1.645) - 1.645 / 20
    assert np.mean(values) == pytest.approx(0.10313 - 0.08225, abs=4 * np.std(values) / 200**0.5)
    assert 0.9 < np.mean(errors) / np.std(values) < 1.5


# ---- scores ----


def test_the_score_is_that_of_the_data() -> None:
    """On N(m, s^2), whose field is known: -(x - m) / (s^2 + e^2), e = (1 - t) / t, and not that of the noise, -x."""
    m, s = 3.0, 0.5

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        variance = t**2 * s**2 + (1 - t) ** 2
        return m + (t * s**2 - (1 - t)) / variance * (x - t * m)

    x = torch.linspace(1, 5, 7, dtype=torch.float64)[:, None]
    for time in (0.98, 0.9):
        e = (1 - time) / time
        found = Score(FunctionField(velocity), time)(x)
        torch.testing.assert_close(found, -(x - m) / (s**2 + e**2))
    # by default within two thousandths of the score of the data
    torch.testing.assert_close(Score(FunctionField(velocity))(x), -(x - m) / s**2, rtol=2e-3, atol=0)
    for time in (0.0, 1.0):
        with pytest.raises(InputError, match="time of a score must be above 0 and below 1"):
            Score(FunctionField(velocity), time)


# ---- first variations ----


def test_a_surrogate_has_the_gradient_that_is_given() -> None:
    x = torch.randn(5, 2, generator=generator())
    slope = Surrogate(lambda x: x**3, lambda x: x.sum(1))
    value, gradient = value_and_gradient(slope, x)
    torch.testing.assert_close(value, x.sum(1))
    torch.testing.assert_close(gradient, x**3)
    value, gradient = value_and_gradient(Surrogate(lambda x: x**3), x)
    assert torch.equal(value, torch.zeros(5))
    torch.testing.assert_close(gradient, x**3)
    with torch.no_grad():
        torch.testing.assert_close(slope(x), x.sum(1))


def test_a_first_variation_is_a_reward_of_prompts() -> None:
    """It hands on what it is told, to rewards and to functions of samples."""
    lengths = from_function(lambda images, prompts: images[:, 0] * torch.tensor([float(len(p)) for p in prompts]))
    whole = of_rewards(lambda r: 2 * r, {"reward": lengths}, "reward") + of_samples(lengths) * 3
    x = torch.tensor([[1.0], [2.0], [3.0]])
    bound = given(whole, ["a", "bb", "ccc"])
    assert isinstance(bound, FirstVariation)
    assert bound(x).tolist() == [5, 20, 45]
    assert bound.select(torch.tensor([2, 0]))(x[[2, 0]]).tolist() == [45, 5]
    assert not whole.black_box
    assert from_function(whole) is whole


def test_of_rewards_is_for_methods_without_gradients() -> None:
    slope = of_rewards(lambda r, c: r - 2 * c, {"reward": lambda x: x[:, 0], "cost": lambda x: x[:, 1]}, "reward", "cost")
    assert slope.black_box
    assert slope.of_rewards is not None
    values = {"reward": torch.tensor([1.0, 2.0]), "cost": torch.tensor([3.0, 0.0])}
    assert slope.of_rewards(values).tolist() == [-5, 2]
    assert slope(torch.tensor([[1.0, 3.0], [2.0, 0.0]])).tolist() == [-5, 2]


def test_a_reward_without_a_gradient_leaves_none_to_the_sum() -> None:
    """With one part constant to autograd, the gradient of the sum would be that of the others."""
    whole = of_rewards(lambda r: r, {"reward": lambda x: x[:, 0].detach()}, "reward") + of_samples(lambda x: x[:, 0])
    with pytest.raises(InputError, match="the reward has no gradient"):
        value_and_gradient(whole, torch.ones(2, 1))


def test_the_dtype_is_that_of_the_samples() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(3, 1, dtype=dtype)
        slope = of_rewards(lambda r: r * torch.ones(3, dtype=torch.float64), {"reward": lambda x: x[:, 0]}, "reward")
        assert (slope + of_samples(lambda x: x[:, 0]))(x).dtype == dtype


# ---- what is known ----


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.zeros(1, 1)}, "two samples or more, got 1"),
        ({"weights": torch.ones(2)}, r"a weight for each of 3 samples, got \[2\]"),
        ({"weights": torch.tensor([1.0, -1.0, 1.0])}, "weights of samples must be finite and not negative"),
        ({"weights": torch.tensor([1.0, torch.inf, 1.0])}, "weights of samples must be finite and not negative"),
        ({"weights": torch.zeros(3)}, "and some above 0"),
    ],
)
def test_what_is_no_law(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Known(**{"x": torch.zeros(3, 1), **wrong})


def test_the_least_that_is_a_law() -> None:
    """Two samples, one of which has all of the weight."""
    assert Known(torch.zeros(2, 1), weights=torch.tensor([0.0, 3.0])).p.tolist() == [0.0, 1.0]


def test_the_error_of_a_mean() -> None:
    """That of a textbook, std / sqrt(n), and the variance that the mean of other samples adds."""
    x, others = torch.tensor([1.0, 2.0, 4.0, 8.0, 9.0]).double(), torch.tensor([0.0, 1.0, 5.0]).double()
    known = Known(x[:, None])
    assert known.estimate(known.mean(x), x).standard_error == pytest.approx(float(x.std()) / 5**0.5)
    expected = (float(x.var()) / 5 + float(others.var()) / 3) ** 0.5
    assert known.estimate(0.0, x, spread_of_mean(others)).standard_error == pytest.approx(expected)


def test_rewards_of_another_number_of_samples() -> None:
    known = Known(torch.zeros(3, 1), rewards={"reward": torch.zeros(2)})
    with pytest.raises(InputError, match="a value of 'reward' for each of 3 samples"):
        known.values("reward")
