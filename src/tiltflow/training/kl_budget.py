r"""The working temperature of a run, from the KL divergence from the base that it may spend (`training.target_kl`).

A temperature is in units of reward, and means something else for every reward; a KL divergence is in nats, and means the same
for all. That of the tilted law p_base exp(eta r), eta = 1 / beta, rises with eta: dKL / d eta = eta Var_eta(r). So the inverse
temperature that spends a budget is found by feedback, in rounds of many batches (dual descent in the logarithm):

    log eta <- log eta + RATE log(budget / KL),      KL the mean over the second half of the round.

The multiplier of an error is 1 - RATE d log KL / d log eta. The derivative is 2 for a weak tilt of any law, and for any tilt of
a normal law by a linear reward, and falls as the reward saturates; so at RATE = 1/2 a round is about a step of Newton's method.

A model follows a change of the temperature only after some time, and starts with no KL at all. Hence

    * the run starts where a weak tilt of the base would spend the budget, KL = eta^2 Var(r) / 2, by the rewards of the first
      batch, of which the method's own beta learns
    * the tilt is not raised in the first quarter of the run: until then too small a KL may only say that the model is on its
      way. It is lowered at any time
    * in the last quarter it is held, at the mean of its logarithm over the quarter before: the law that the run aims at is the
      tilt at that temperature. Its KL is measured, and is near the budget; it is not the budget.
"""

# Mutation tests: test_kl_budget.py

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tiltflow import processes

RATE = 0.5
ROUNDS = 16
"""In a run; fewer if it has fewer batches."""
HOLD, FREEZE, SETTLED = 0.25, 0.75, 0.5
"""Shares of the run: until HOLD the tilt is not raised, from FREEZE on it is held, at its mean since SETTLED."""
DEAD_BAND = 0.02
"""Deviations of log KL that change nothing."""
MOST = math.log(2)
"""Largest change of log eta in a round."""
LIMIT = 30.0
"""Largest factor between the temperature and the one that the rewards of the first batch gave."""
GRID = 2.0**20
"""log eta is rounded to a multiple of 1 / GRID, so that the rounding of sums does not become another temperature."""
MEASURED = ("kl", "path_kl")
"""The KL in the metrics of a batch: of a law, or of the paths of the chain that is controlled."""


class KlBudget:
    """Feedback of the measured KL to the inverse temperature."""

    def __init__(self, budget: float, beta: float, max_train_steps: int):
        self.budget, self.steps = budget, max_train_steps
        self.log_eta = -math.log(beta)
        self.start: float | None = None
        """log eta by the rewards of the first batch."""
        self.seen: list[float] = []
        """The KLs of the batches of this round."""
        self.settled: list[float] = []
        """log eta after each round since SETTLED."""
        self.round = 0

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        return {name: value for name, value in vars(self).items() if name not in ("budget", "steps")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        vars(self).update(state)

    @property
    def working_beta(self) -> float:
        """The temperature to run at, in units of reward."""
        return math.exp(-self.log_eta)

    @property
    def at_limit(self) -> bool:
        """True where the budget would need another temperature than the limit allows."""
        reach = math.log(LIMIT)
        return self.start is not None and math.isclose(abs(self.log_eta - self.start), reach, rel_tol=0, abs_tol=DEAD_BAND)

    def update(self, measured: Mapping[str, float], step: int) -> None:
        """Note the KL of a batch, where the method has measured it; adapt the temperature at the end of a round."""
        kls = [measured[key] for key in MEASURED if key in measured][:1]
        kls, deviation = processes.exchanged([kls, measured.get("reward_std", 0.0)])[0]  # the same numbers in all processes
        if self.start is None:
            self.start = self._begin(deviation)
        self.seen += kls
        done, current = step / self.steps, step * ROUNDS // self.steps
        if current == self.round or self.round >= FREEZE * ROUNDS:
            return
        half = self.seen[len(self.seen) // 2 :]
        change = changed(math.fsum(half) / len(half), self.budget) if half else 0.0
        change, reach = min(change, 0.0) if done <= HOLD else change, math.log(LIMIT)
        self._set(min(max(self.log_eta + change, self.start - reach), self.start + reach))
        self.round, self.seen = current, []
        if done > SETTLED:
            self.settled.append(self.log_eta)
        if done >= FREEZE and self.settled:
            self._set(math.fsum(self.settled) / len(self.settled))

    def _begin(self, deviation: float) -> float:
        """Go to the inverse temperature at which a weak tilt of rewards of this deviation would spend the budget."""
        if deviation > 0:
            self._set(math.log(2 * self.budget) / 2 - math.log(deviation))
        return self.log_eta

    def _set(self, log_eta: float) -> None:
        self.log_eta = round(log_eta * GRID) / GRID


def changed(kl: float, budget: float, rate: float = RATE) -> float:
    """The change of log eta after a round of this KL."""
    error = math.log(budget / kl) if kl > 0 else math.inf
    return 0.0 if abs(error) < DEAD_BAND else min(max(rate * error, -MOST), MOST)
