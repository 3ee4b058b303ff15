r"""The mean of a reward, with a limit on a cost that a multiplier enforces, stage by stage.

For the limit E c <= C on the mean of the law, with a multiplier m >= 0 and a price g of a violation,

    F(p) = E r - (max(0, m + g (E c - C))^2 - m^2) / (2 g),        m <- max(0, m + g (E c - C)) after a stage:

the multiplier settles where the limit holds, and the best law is then the best of those that keep it. With the square inside
the mean, E max(0, m + g (c - C))^2, each sample is held to the limit and not the mean of the law: the same multiplier then ends
at another law, which is not as good (`samples: true`).
"""

# Mutation tests: test_utilities.py

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_rewards
from tiltflow.utilities.estimation.known import Known


class AugmentedLagrangian(Utility):
    """E r less a penalty of a cost above its limit; `after` has the multiplier of the next stage."""

    reward_names: ClassVar[tuple[str, ...]] = ("reward", "cost")

    name: Literal["augmented-lagrangian"] = "augmented-lagrangian"
    limit: float = 0.0
    """C: the cost is to be at most this."""
    price: Annotated[float, Field(gt=0)] = 1.0
    """g: how fast the penalty grows with the violation, and the multiplier from stage to stage."""
    multiplier: Annotated[float, Field(ge=0)] = 0.0
    """m of the first stage: what a unit of cost costs at the limit."""
    samples: bool = False
    """True to hold each sample to the limit, and not the mean of the law."""

    @property
    def words(self) -> str:
        whose = "cost of each sample" if self.samples else "mean cost"
        return f"a high mean of the reward, and a {whose} of at most {self.limit:g}"

    def after(self, at: Known) -> Self:
        pressure = self._pressure(at.mean(at.values("cost")))
        return self.model_copy(update={"multiplier": float(pressure)})

    def _pressure(self, cost: Tensor) -> Tensor:
        return torch.relu(self.multiplier + self.price * (cost - self.limit))

    def _penalty(self, cost: Tensor) -> Tensor:
        return (self._pressure(cost) ** 2 - self.multiplier**2) / (2 * self.price)

    def _value(self, at: Known) -> Estimate:
        r, c = at.values("reward"), at.values("cost")
        if self.samples:
            return at.estimate(at.mean(r - self._penalty(c)), r - self._penalty(c))
        mean = at.mean(c)
        return at.estimate(at.mean(r) - self._penalty(mean), r - self._pressure(mean) * c)

    def _first_variation(self, at: Known) -> FirstVariation:
        if self.samples:
            return of_rewards(lambda r, c: r - self._penalty(c), at.reward, "reward", "cost")
        pressure = float(self._pressure(at.mean(at.values("cost"))))
        return of_rewards(lambda r, c: r - pressure * c, at.reward, "reward", "cost")
