"""The mean of a reward: a utility whose stages are one tilt."""

from __future__ import annotations

from typing import ClassVar, Literal

from tiltflow.evaluation.estimates import Estimate
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_rewards
from tiltflow.utilities.estimation.known import Known


class ExpectedReward(Utility):
    """E r. K stages at the temperature K beta are one tilt at beta."""

    words: ClassVar[str] = "a high mean of the reward"
    reward_names: ClassVar[tuple[str, ...]] = ("reward",)

    name: Literal["expected-reward"] = "expected-reward"

    def _value(self, at: Known) -> Estimate:
        r = at.values("reward")
        return at.estimate(at.mean(r), r)

    def _first_variation(self, at: Known) -> FirstVariation:
        return of_rewards(lambda r: r, at.reward, "reward")
