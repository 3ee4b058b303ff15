"""The entropic risk of a reward: its mean on a scale that stretches the good, or the bad."""

# Mutation tests: test_utilities.py

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import field_validator

from tiltflow.evaluation.estimates import Estimate
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_rewards
from tiltflow.utilities.estimation.known import Known


class EntropicRisk(Utility):
    """log E exp(l r) / l. Its first variation is exp(l r) / (l E exp(l r)): the gradient of the reward with the weight of the
    sample in the law tilted by l r. Near l = 0 it is E r + l Var r / 2."""

    reward_names: ClassVar[tuple[str, ...]] = ("reward",)

    name: Literal["entropic-risk"] = "entropic-risk"
    risk: float = -1.0
    """l, in units of 1 / reward, not 0: above 0 high rewards are sought, below 0 low ones avoided."""

    @field_validator("risk")
    @classmethod
    def _not_zero(cls, risk: float) -> float:
        if risk == 0:
            raise ValueError("must not be 0: that is the utility expected-reward")
        return risk

    @property
    def words(self) -> str:
        return "high rewards, the highest above all" if self.risk > 0 else "no low rewards, the lowest least of all"

    @property
    def concave(self) -> bool:
        return self.risk > 0

    def _log_mean(self, at: Known) -> float:
        return float(torch.logsumexp(self.risk * at.values("reward") + at.p.log(), 0))

    def _value(self, at: Known) -> Estimate:
        log_mean = self._log_mean(at)
        return at.estimate(log_mean / self.risk, (self.risk * at.values("reward") - log_mean).exp() / self.risk)

    def _first_variation(self, at: Known) -> FirstVariation:
        log_mean = self._log_mean(at) + math.log(abs(self.risk))
        sign = math.copysign(1, self.risk)
        return of_rewards(lambda r: sign * (self.risk * r - log_mean).exp(), at.reward, "reward")
