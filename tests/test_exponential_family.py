"""The exponential family of a reward: weights, partition functions and divergences of samples of several laws, on two modes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltflow.laws.exponential_family import Pooled, effective_share, next_tilt, tilt_of
from tiltflow.problems.two_modes import TwoModes

COUNT = 20_000
LAW = TwoModes().law()


def rewards_at(tilt: float, count: int = COUNT) -> Tensor:
    """tanh x of the quantiles of the base, tilted by exp(tilt tanh x): as good as exact samples without noise."""
    tilted = LAW.tilt(tilt * np.tanh(LAW.points))
    return torch.from_numpy(np.tanh(tilted.quantiles((np.arange(count) + 0.5) / count)))


def pooled(*tilts: float, counts: tuple[int, ...] | None = None) -> Pooled:
    counts = counts or (COUNT,) * len(tilts)
    rewards = torch.cat([rewards_at(tilt, count) for tilt, count in zip(tilts, counts, strict=True)])
    return Pooled.of(rewards, torch.cat([torch.full((n,), tilt) for tilt, n in zip(tilts, counts, strict=True)]))


@pytest.mark.parametrize(
    ("tilts", "share"), [((0.0,), 0.6639), ((0.75,), 0.9755), ((0.0, 0.5), 0.7914), ((0.0, 0.25, 0.5, 0.75), 0.8464)]
)
def test_the_effective_share_of_samples_of_several_tilts(tilts: tuple[float, ...], share: float) -> None:
    assert effective_share(pooled(*tilts).weights(1.0)) == pytest.approx(share, abs=2e-4)


def test_no_weight_exceeds_the_number_of_laws() -> None:
    assert pooled(0.0, 0.25, 0.5, 0.75).weights(1.0).max() == pytest.approx(1.41, abs=5e-3)
    far = pooled(0.0, 20.0)
    for tilt in (0.0, 20.0):
        assert far.weights(tilt).max() < 2.0001


@pytest.mark.parametrize("tilts", [(0.0,), (0.0, 1.0), (0.5, 2.0, 1.0), (2.0, 0.0)])
def test_weights_give_the_expectations_of_any_tilt(tilts: tuple[float, ...]) -> None:
    family = pooled(*tilts, counts=(20_000, 5_000, 10_000)[: len(tilts)])
    for tilt, expected in ((0.0, 0.0), (1.0, 0.61689), (10 / 3, 0.89566)):
        if tilt <= max(tilts) + 1:
            weights = family.weights(tilt)
            assert weights.mean() == pytest.approx(1)
            assert (weights * family.rewards).mean() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("tilts", [(0.0,), (0.0, 1.0), (1.0, 2.0)])
def test_partition_functions_and_divergences(tilts: tuple[float, ...]) -> None:
    """log E exp(r) = log 1.406762; KL(p_1 | p_base) = .27560 and at 10 / 3 .72746."""
    family = pooled(*tilts)
    assert family.log_partition(1.0) - family.log_partition(0.0) == pytest.approx(np.log(1.406762), abs=1e-3)
    assert family.divergence(1.0) == pytest.approx(0.27560, abs=1e-3)
    assert family.divergence(0.0) == pytest.approx(0, abs=1e-12)
    if max(tilts) > 1:
        assert family.divergence(10 / 3) == pytest.approx(0.72746, abs=3e-3)


def test_weights_ignore_the_offset_of_the_reward_and_scale_with_it() -> None:
    family = pooled(0.0, 1.0)
    tilts = torch.cat([torch.zeros(COUNT), torch.ones(COUNT)])
    moved = Pooled.of(1e6 + 1e3 * family.rewards, tilts / 1e3)
    torch.testing.assert_close(moved.weights(2e-3), family.weights(2.0), rtol=1e-6, atol=0)
    assert moved.divergence(1e-3) == pytest.approx(family.divergence(1.0), abs=1e-6)


def test_equal_rewards_have_weights_of_exactly_one() -> None:
    for count in (3, 7, 1000):
        family = Pooled.of(torch.full((count,), 0.1), torch.cat([torch.zeros(2), torch.ones(count - 2)]))
        for tilt in (0.0, 0.3, 1.0):
            assert torch.equal(family.weights(tilt), torch.ones(count, dtype=torch.float64))


def test_huge_rewards_do_not_overflow() -> None:
    rewards = torch.tensor([0.0, 1e30, -1e30, 5e29])
    weights = Pooled.of(rewards, torch.zeros(4)).weights(1.0)
    assert weights.tolist() == [0.0, 4.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("rise", "shares"), [(0.25, (0.9559, 0.9611, 0.9682, 0.9755)), (10 / 12, (0.7179, 0.8831, 0.9628, 0.9869))]
)
def test_the_effective_share_of_each_round(rise: float, shares: tuple[float, ...]) -> None:
    """Four rounds of equal rises to a tilt of 1, and of 10 / 3."""
    for j, share in enumerate(shares):
        rewards = rewards_at(j * rise)
        assert effective_share((rise * rewards).exp()) == pytest.approx(share, abs=3e-4)
        for wanted in (50.0, -50.0):
            found = next_tilt([rewards], j * rise, wanted, 0.8)
            assert effective_share(((found - j * rise) * rewards).exp()) == pytest.approx(0.8, abs=1e-4)


def test_the_next_tilt_stops_at_what_is_wanted() -> None:
    rewards = rewards_at(0.0)
    assert next_tilt([rewards], 0.0, 1.0, 0.66) == 1.0
    assert next_tilt([rewards], 0.0, 1.0, 0.0) == 1.0
    assert next_tilt([rewards], 1.0, 0.4, 0.5) == 0.4
    assert next_tilt([rewards], 0.7, 0.7, 0.99) == 0.7


def test_the_next_tilt_is_the_last_part_of_the_way_that_keeps_the_share() -> None:
    """exp(h x) of N(0, s^2): the share is exp(-h^2 s^2)."""
    rewards = 3.0 * torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    found = next_tilt([rewards], 0.0, 2.0, 0.7)
    assert found == pytest.approx((-np.log(0.7)) ** 0.5 / 3, rel=1e-3)
    part = found / 2.0 * 2**20
    assert part == int(part)
    shares = [effective_share((2.0 * (part + k) / 2**20 * rewards).exp()) for k in (0, 1)]
    assert shares[0] >= 0.7 > shares[1]


def test_weights_of_the_next_tilt_are_normalised_within_groups() -> None:
    """Two groups that differ by an offset alone are as good as one."""
    rewards = rewards_at(0.0, 1000)
    alone = next_tilt([rewards], 0.0, 10.0, 0.7)
    assert next_tilt([rewards, rewards + 50], 0.0, 10.0, 0.7) == pytest.approx(alone, rel=1e-5)
    assert next_tilt([torch.cat([rewards, rewards + 50])], 0.0, 10.0, 0.7) < alone / 10


def test_a_group_counts_by_its_number_of_samples() -> None:
    """exp(h x) of N(0, 1) in two thirds of the samples, equal rewards in the rest: a share of 3 / (2 exp(h^2) + 1)."""
    rewards = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    found = next_tilt([rewards, torch.full((10_000,), 7.0, dtype=torch.float64)], 0.0, 2.0, 0.8)
    assert found == pytest.approx(np.log(1.375) ** 0.5, rel=2e-3)


def test_a_share_that_is_just_kept_is_enough() -> None:
    """Half of the samples have no weight left at any tilt, and the others all that there is."""
    rewards = torch.tensor([0.0, 0.0, -1e30, -1e30], dtype=torch.float64)
    assert next_tilt([rewards], 0.0, 1.0, 0.5) == 1.0
    assert next_tilt([torch.zeros(4, dtype=torch.float64)], 0.0, 1.0, 1.0) == 1.0


def test_rewards_that_spread_too_far_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the rewards spread too far: a tilt of 9\.5e-07 more leaves less than 0\.7"):
        next_tilt([torch.tensor([0.0, 0.0, 1e30], dtype=torch.float64)], 0.0, 1.0, 0.7)


def test_the_effective_share() -> None:
    assert effective_share(torch.tensor([1.0, 3.0])) == pytest.approx(0.8)
    assert effective_share(torch.tensor([0.0, 0.0, 0.0, 5.0])) == pytest.approx(0.25)


@pytest.mark.parametrize("tilt", [0.6, 1.0, 1.4])
def test_a_tilt_is_found_by_its_mean_reward(tilt: float) -> None:
    mean = rewards_at(tilt).mean().item()
    for family in (pooled(0.0), pooled(0.0, 0.8)):
        assert tilt_of([(family, mean)], 1.0) == pytest.approx(tilt, abs=2e-3)
        assert tilt_of([(family, mean), (family, mean + 0.01), (family, mean - 0.01)], 1.0) == pytest.approx(tilt, abs=2e-3)
    mirrored = Pooled.of(-rewards_at(0.0), torch.zeros(COUNT))
    assert tilt_of([(mirrored, -mean)], -1.0) == pytest.approx(-tilt, abs=2e-3)


def test_a_tilt_is_not_looked_for_far_from_where_it_should_be() -> None:
    assert tilt_of([(pooled(0.0), -0.5)], 2.0) == pytest.approx(1.0)
    assert tilt_of([(pooled(0.0), 0.999)], 2.0) == pytest.approx(3.0)


def test_a_sample_that_went_astray_does_not_decide_the_tilt() -> None:
    family = pooled(0.0)
    inside = family.rewards[::7]
    assert torch.equal(family.within(inside), inside)
    astray = family.within(torch.tensor([-8e6, 8e6]))
    assert astray.tolist() == [family.rewards.min().item(), family.rewards.max().item()]
