"""The mean of a reward, within a limit on the mean of a cost that is never crossed."""

# Mutation tests: test_utilities.py

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_rewards
from tiltflow.utilities.estimation.known import Known


class LogBarrier(Utility):
    """E r + b log(C - E c). Its first variation is r - b c / (C - E c): the price of the cost rises without limit toward C. A
    law that costs C or more has no utility."""

    reward_names: ClassVar[tuple[str, ...]] = ("reward", "cost")

    name: Literal["log-barrier"] = "log-barrier"
    limit: float
    """C: the mean of the cost stays below it."""
    strength: Annotated[float, Field(gt=0)] = 0.1
    """b, in units of reward: with a smaller one the best law comes nearer to the limit."""

    @property
    def words(self) -> str:
        return f"a high mean of the reward, and a mean cost below {self.limit:g}"

    def _room(self, at: Known) -> tuple[Tensor, float]:
        """The costs [n], and C - E c."""
        costs = at.values("cost")
        mean = at.estimate(at.mean(costs), costs)
        if mean.value >= self.limit:
            raise InputError(
                f"utility log-barrier: the mean cost, {mean}, is not below the limit {self.limit:g}: start from a law that"
                " costs less, raise the limit, or take augmented-lagrangian, which may cross it on its way"
            )
        return costs, self.limit - mean.value

    def _value(self, at: Known) -> Estimate:
        costs, room = self._room(at)
        r = at.values("reward")
        return at.estimate(at.mean(r) + self.strength * math.log(room), r - self.strength / room * costs)

    def _first_variation(self, at: Known) -> FirstVariation:
        price = self.strength / self._room(at)[1]
        return of_rewards(lambda r, c: r - price * c, at.reward, "reward", "cost")
