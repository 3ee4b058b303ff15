r"""RAFT: regression on the best of n samples, with nothing else (arXiv 2304.06767).

Samples of a prompt, class or batch are split into sets of n; the one with the largest reward in each is learned by flow
matching, and the others are left out. Of samples of the base the law is that of the best of n, n F(r)^(n - 1) p_base, F the
distribution function of the reward; on the model's own, m rounds make it the best of n^m. It is no tilt, and there is no law at
which this settles.
"""

# Mutation tests: test_reweighting.py

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.laws.other_laws import best_of
from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.methods import Positive
from tiltflow.methods.regressions.reweighting import Reweighting
from tiltflow.samplers.grid import Start


class Raft(Reweighting):
    """RAFT. Any reward, no gradient; aims at the law of the best of n, which is no tilt."""

    name: Literal["raft"] = "raft"
    n: Annotated[int, Field(ge=2)] = 4
    """Samples that each is chosen from, of one prompt, class or batch."""
    beta: Positive = 1.0
    """Changes nothing of the training: the temperature of the tilted law that reports put beside the run."""
    proposal: Literal["base", "tuned"] = "tuned"
    """Whose samples are chosen among. tuned: the model's own, as it is at the start of each round, which is RAFT. base: those
    of the base, all along: the law of the best of n, once."""

    def learns_nothing(self, group: int) -> str | None:
        """See `MethodSettings`: fewer than n samples are no set to choose from."""
        if group >= self.n:
            return None
        return f"the best of {self.n} samples of a prompt, a class or a batch is learned, and there are {group}"

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """The law of the best of n^m after m rounds."""
        best = self.n ** self.rounds(steps)
        caveats = [f"The law is that of the best of {best:.4g} samples of the base: no tilt of it at any temperature."]
        if self.proposal == "tuned":
            caveats.append("Nothing holds the model near the base: every further round chooses again.")
        return replace(
            exponential_tilt(self.beta, caveats, reaches="none"),
            words=f"the law of the best of {best:.4g} samples of the base",
            exact=lambda base, reward: best_of(base, reward, best),
        )

    def _weights(self, rewards: Tensor, members: list[Tensor]) -> Tensor:
        """1 for the first of the best of each set, over the share that these are; what does not fill a set is left out."""
        weights = torch.zeros(len(rewards), dtype=torch.float64)
        for some in (each.cpu() for each in members):
            sets = some[: len(some) // self.n * self.n].reshape(-1, self.n)
            if len(sets):
                best = rewards.cpu()[sets].argmax(1, keepdim=True)
                weights[sets.gather(1, best)[:, 0]] = len(some) / len(sets)
        return weights
