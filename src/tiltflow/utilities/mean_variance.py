"""The mean of a reward less its variance: rewards that are high and alike."""

# Mutation tests: test_utilities.py

from __future__ import annotations

from typing import ClassVar, Literal

from tiltflow.evaluation.estimates import Estimate
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_rewards
from tiltflow.utilities.estimation.known import Known


class MeanVariance(Utility):
    """E r - c Var r. Its first variation is r - c (r - m)^2, m = E r: less c m^2, which is the same everywhere, r - c (r^2 - 2
    m r)."""

    reward_names: ClassVar[tuple[str, ...]] = ("reward",)

    name: Literal["mean-variance"] = "mean-variance"
    aversion: float = 1.0
    """c: what a unit of variance costs, in units of 1 / reward; below 0 variance is sought."""

    @property
    def words(self) -> str:
        return f"a high mean of the reward and a {'low' if self.aversion >= 0 else 'high'} variance"

    @property
    def concave(self) -> bool:
        return self.aversion <= 0

    def _value(self, at: Known) -> Estimate:
        r = at.values("reward")
        mean = at.mean(r)
        # a sum of squares around the mean of the same samples is too small by this factor on the average
        variance = at.mean((r - mean) ** 2) / (1 - (at.p**2).sum())
        return at.estimate(mean - self.aversion * variance, r - self.aversion * (r - mean) ** 2)

    def _first_variation(self, at: Known) -> FirstVariation:
        mean = float(at.mean(at.values("reward")))
        return of_rewards(lambda r: r - self.aversion * (r - mean) ** 2, at.reward, "reward")
