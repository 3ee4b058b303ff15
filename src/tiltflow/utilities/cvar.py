"""The mean reward of the worst samples: no catastrophes (conditional value at risk)."""

# Mutation tests: test_utilities.py

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.tails import worst_share
from tiltflow.laws.tail_duals import lower_threshold
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_rewards
from tiltflow.utilities.estimation.known import Known


class Cvar(Utility):
    """The mean of the worst share s of rewards, max over t of t - E (t - r)+ / s. Its first variation is -(q - r)+ / s with q
    the quantile at s: only samples below q have a gradient, 1 / s times that of the reward."""

    reward_names: ClassVar[tuple[str, ...]] = ("reward",)
    concave: ClassVar[bool] = False

    name: Literal["cvar"] = "cvar"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the samples that counts, the worst ones, above 0 and below 1."""

    @property
    def words(self) -> str:
        return f"a high mean reward of the worst {self.share:.3g} of samples"

    def caveats(self, alpha: float) -> tuple[str, ...]:
        return (*super().caveats(alpha), "the tilt at one threshold, searched among all rewards, is the best of all (one_shot)")

    def _value(self, at: Known) -> Estimate:
        r = at.values("reward")
        mean, threshold = worst_share(r, at.p, self.share)
        return at.estimate(mean, (threshold - r).clamp(min=0) / -self.share)

    def _first_variation(self, at: Known) -> FirstVariation:
        return self._tail(at, worst_share(at.values("reward"), at.p, self.share)[1])

    def one_shot(self, base: Known, alpha: float) -> FirstVariation:
        """The reward whose tilt of the base at the temperature alpha maximises this utility less alpha KL, in one stage: the
        first variation at the threshold of that law (`laws.tail_duals`), estimated from samples of the base."""
        base.check(self.name, self.reward_names, ())
        r = base.values("reward")
        worst_share(r, base.p, self.share)  # refuses a tail without a sample
        return self._tail(base, lower_threshold(base.p.cpu().numpy(), r.cpu().numpy(), self.share, alpha))

    def _tail(self, at: Known, threshold: float) -> FirstVariation:
        return of_rewards(lambda r: -torch.relu(threshold - r) / self.share, at.reward, "reward")
