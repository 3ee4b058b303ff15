"""The mean reward of the best samples: extremes, however few (superquantile)."""

# Mutation tests: test_utilities.py

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.tails import best_share
from tiltflow.laws.tail_duals import upper_threshold
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_rewards
from tiltflow.utilities.estimation.known import Known


class Superquantile(Utility):
    """The mean of the best share s of rewards, min over t of t + E (r - t)+ / s: the superquantile at the level 1 - s. Its
    first variation is (r - q)+ / s with q the quantile at 1 - s: only samples above q have a gradient, 1 / s times that of the
    reward. `estimation.tail_pool` keeps enough of them."""

    reward_names: ClassVar[tuple[str, ...]] = ("reward",)

    name: Literal["superquantile"] = "superquantile"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the samples that counts, the best ones, above 0 and below 1: 0.01 is the superquantile at the level 0.99."""

    @property
    def words(self) -> str:
        return f"a high mean reward of the best {self.share:.3g} of samples"

    def _value(self, at: Known) -> Estimate:
        r = at.values("reward")
        mean, threshold = best_share(r, at.p, self.share)
        return at.estimate(mean, (r - threshold).clamp(min=0) / self.share)

    def _first_variation(self, at: Known) -> FirstVariation:
        return self._tail(at, best_share(at.values("reward"), at.p, self.share)[1])

    def one_shot(self, base: Known, alpha: float) -> FirstVariation:
        """The reward whose tilt of the base at the temperature alpha maximises this utility less alpha KL, in one stage: the
        first variation at the threshold of that law (`laws.tail_duals`), estimated from samples of the base."""
        base.check(self.name, self.reward_names, ())
        r = base.values("reward")
        best_share(r, base.p, self.share)  # refuses a tail without a sample
        return self._tail(base, upper_threshold(base.p.cpu().numpy(), r.cpu().numpy(), self.share, alpha))

    def _tail(self, at: Known, threshold: float) -> FirstVariation:
        return of_rewards(lambda r: torch.relu(r - threshold) / self.share, at.reward, "reward")
