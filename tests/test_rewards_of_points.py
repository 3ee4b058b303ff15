"""Rewards of points against their formulas, and their gradients against finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.plugins import find
from tiltflow.rewards import LearnedReward, RewardSettings
from tiltflow.rewards.functions.checked import value_and_gradient
from tiltflow.settings import validate
from tiltflow.streams import stream

STEPS = [{"at": -1.5, "height": -15.0, "width": 0.25}, {"at": 1.5, "height": -30.0, "width": 0.5}]
BUMPS = [{"at": 3.65, "height": 560.0, "width": 0.08}]
REWARDS: list[dict[str, Any]] = [
    {"name": "profile", "constant": 55.0, "steps": STEPS, "bumps": BUMPS},
    {"name": "profile", "bumps": [{"at": 1.0, "height": 2.0, "width": 1.5}], "direction": [1.0, -2.0, 2.0]},
    {"name": "norm"},
    {"name": "norm", "scale": -2.5, "center": [1.0, -0.5, 2.0]},
]


def settings(tree: dict[str, Any]) -> Any:
    return validate(find("rewards", tree["name"]), tree, "reward")


def points(count: int = 20) -> Tensor:
    x = 2 * torch.randn(count, 3, generator=stream(0), dtype=torch.float64)
    x[0, 0] = 3.7  # on the spike
    return x


@pytest.mark.parametrize("tree", REWARDS)
def test_the_gradient_is_that_of_finite_differences(tree: dict[str, Any]) -> None:
    reward, x, step = settings(tree).build(), points(), 1e-5
    value, gradient = value_and_gradient(reward, x)
    assert torch.equal(value, reward(x))
    for i, way in enumerate(torch.eye(3, dtype=torch.float64)):
        slope = (reward(x + step * way) - reward(x - step * way)) / (2 * step)
        torch.testing.assert_close(gradient[:, i], slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tree", REWARDS)
def test_conventions(tree: dict[str, Any]) -> None:
    made = settings(tree)
    assert isinstance(made, RewardSettings)
    assert made.differentiable
    assert not isinstance(made.build(), LearnedReward)
    for text in (made.unit, made.description):
        assert text
        assert not text.endswith(".")
    assert type(made).model_validate(made.model_dump(mode="json")) == made


def test_the_profile_is_its_formula() -> None:
    """Past a step at the level that it leaves, half way at its place; on a bump its height more."""
    x = torch.tensor([[-9.0, 5.0], [-1.5, 0.0], [0.0, 0.0], [1.5, 0.0], [3.65, 0.0], [3.65 + 0.08, 0.0], [9.0, 0.0]])
    first, second = (
        [1 / (1 + math.exp(-(s - at) / width)) for s in x[:, 0].tolist()] for at, width in ((-1.5, 0.25), (1.5, 0.5))
    )
    bump = [0, 0, 0, 0, 1, math.exp(-0.5), 0]
    expected = [55 - 15 * a - 30 * b + 560 * c for a, b, c in zip(first, second, bump, strict=True)]
    found = settings(REWARDS[0]).build()(x.double())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-3)
    assert found[[0, 1, 3, 6]].tolist() == pytest.approx([55, 55 - 7.5, 40 - 15, 10], abs=0.1)
    along = settings(REWARDS[1]).build()(torch.tensor([[1.0, -2.0, 2.0], [1 / 3, -2 / 3, 2 / 3]]))
    assert along.tolist() == pytest.approx([2 * math.exp(-(4 / 1.5**2) / 2), 2.0])  # s is 3 and 1: the direction has no length


def test_the_norm_is_its_formula() -> None:
    x = torch.tensor([[3.0, 0.0, 4.0], [1.0, -0.5, 2.0]])
    assert settings(REWARDS[2]).build()(x).tolist() == pytest.approx([5.0, math.sqrt(5.25)])
    value, gradient = value_and_gradient(settings(REWARDS[3]).build(), x)
    assert value.tolist() == pytest.approx([-2.5 * math.sqrt(8.25), 0.0])
    assert gradient[1].tolist() == [0, 0, 0]  # at the centre, where it has none, and no NaN


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "profile"}, "steps and bumps: give one at least"),
        ({"name": "profile", "bumps": BUMPS, "direction": [0.0, 0.0]}, "direction: must not be 0"),
        ({"name": "profile", "bumps": [{"at": 0.0, "height": 1.0, "width": 0.0}]}, "greater than 0"),
    ],
)
def test_what_means_nothing_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(tree)


@pytest.mark.parametrize("tree", [{"name": "norm", "center": [1.0]}, REWARDS[1]])
def test_points_of_another_dimension_are_refused(tree: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="numbers, and a sample 2"):
        settings(tree).build()(torch.zeros(4, 2))
