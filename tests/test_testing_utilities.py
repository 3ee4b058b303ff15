"""`check_utility`: every built-in passes it, and mistakes that have been printed or shipped elsewhere do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from test_utilities import DESIGN
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate
from tiltflow.plugins import find, names
from tiltflow.testing import check_utility
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_rewards, of_samples
from tiltflow.utilities.estimation.known import Known
from tiltflow.utilities.mmd import Mmd
from tiltflow.utilities.superquantile import Superquantile

X = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SETTINGS: dict[str, dict[str, Any]] = {
    "log-barrier": {"limit": 3.0},
    "augmented-lagrangian": {"multiplier": 1.0},
    "optimal-design": DESIGN,
    "sum": {"utilities": [{"utility": "expected-reward"}, {"utility": "wasserstein-2", "weight": 0.1}]},
    "function": {"path": "test_testing_utilities:variance_of_rewards"},
}


def reward(x: Tensor) -> Tensor:
    return x[:, 0].sin() + x[:, 1] / 2


def cost(x: Tensor) -> Tensor:
    return x.square().mean(1)


def variance_of_rewards(x: Tensor, rewards: Tensor) -> Tensor:
    return rewards.var()


def score(x: Tensor) -> Tensor:
    return -x


def log_odds(x: Tensor) -> Tensor:
    return torch.stack([x[:, 0], -x[:, 0] / 2, x[:, 1]], 1)


def at() -> Known:
    return Known(
        X,
        reward={"reward": reward, "cost": cost},
        score=score,
        base_score=lambda x: -x / 2,
        log_ratio=lambda x: -x.square().sum(1) / 4,
        log_odds=log_odds,
        labels=torch.arange(200) % 3,
        reference=X.flip(0) * 1.4 + 0.5,
    )


@pytest.mark.parametrize("name", names("utilities"))
def test_every_utility_passes(name: str) -> None:
    check_utility(find("utilities", name)(**SETTINGS.get(name, {})), at())


class PerBatch(Superquantile):
    """Its indicator divided by the number of samples."""

    def _first_variation(self, at: Known) -> FirstVariation:
        return super()._first_variation(at) * (1 / len(at.x))


class TimesTheShare(Superquantile):
    """Its tail gradient multiplied by the share instead of divided by it."""

    def _first_variation(self, at: Known) -> FirstVariation:
        return super()._first_variation(at) * self.share**2


class OtherEnd(Superquantile):
    """The level taken for the share."""

    def _first_variation(self, at: Known) -> FirstVariation:
        return Superquantile(share=1 - self.share)._first_variation(at)


class NotAlone(Utility):
    """Rewards less their mean in the batch that is asked."""

    reward_names: ClassVar[tuple[str, ...]] = ("reward",)

    name: Literal["not-alone"] = "not-alone"

    def _value(self, at: Known) -> Estimate:
        return at.estimate(at.mean(at.values("reward")), at.values("reward"))

    def _first_variation(self, at: Known) -> FirstVariation:
        return of_rewards(lambda r: r - r.mean(), at.reward, "reward")


class Random(NotAlone):
    """Another one each time."""

    def _first_variation(self, at: Known) -> FirstVariation:
        scale = float(torch.rand(()))
        return of_rewards(lambda r: r * scale, at.reward, "reward")


class WrongGradient(Mmd):
    """The kernel of the samples among themselves is constant to autograd."""

    def _first_variation(self, at: Known) -> FirstVariation:
        witness = self._witness(at)
        return of_samples(lambda x: -2 * (witness(x).detach() + x[:, 0] / 100))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (PerBatch(), r"changes by (199|200) times .* samples move"),
        (TimesTheShare(), r"changes by (99\.\d|100) times"),
        (OtherEnd(), r"the value changes by .* times what the first variation says"),
        (NotAlone(), "changes with its neighbours"),
        (Random(), "first variation is not the same twice"),
        (WrongGradient(), "the gradient of the first variation is off by"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_mistakes_are_found(wrong: Utility, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_utility(wrong, at())


def test_weights_stay_weights() -> None:
    check_utility(Superquantile(), replace(at(), weights=1 + X[:, 0].sin() / 2))
