r"""Reweighted samples: regression of the velocity on samples that count by their rewards, without anything that holds the model
near the base. RWR and RAFT, which differ in the weights.

With W >= 0 the weight of a sample, of mean 1 among those of its prompt, class or batch, a round is

    d = W (u - v),

flow matching on the weighted samples: its law is w q for samples of a law q. On samples of the base that is the end of it; on
the model's own every round weighs the law again.
"""

# Mutation tests: test_reweighting.py

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Literal

from torch import Tensor

from tiltflow.errors import CollapseError
from tiltflow.methods.regressions.drawn_samples import Count, Rounds, as_it_was, weights_of
from tiltflow.methods.regressions.forward_process import Learned, Regression, numbered
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs


class Reweighting(Regression):
    """Part of the settings of the methods that learn from weighted samples."""

    proposal: Literal["base", "tuned"] = "base"
    """Whose samples are weighted. base: those of the base, all along. tuned: the model's own, as it is at the start of each
    round: every round weighs the law again, without end."""
    batches_per_round: Count = 1
    """Batches in a round, all drawn from the weights at its start."""

    @abstractmethod
    def _weights(self, rewards: Tensor, members: list[Tensor]) -> Tensor:
        """The weight of each sample [n], float64, of mean 1 among those of its condition.

        Args:
            members: indices of the samples of each condition.
        """

    @property
    def needs(self) -> Needs:
        """Takes any reward, which may learn."""
        return Needs(learned_reward=True, begins_as_base=self.proposal == "tuned", passes=self.num_passes)

    def rounds(self, steps: int) -> int:
        """How often a run of so many optimizer steps weighs the law."""
        return 1 if self.proposal == "base" else math.ceil(steps / (self.num_passes * self.batches_per_round))

    def gradients(self, batch: Batch, state: Rounds) -> Iterator[dict[str, float]]:
        """One batch of a round: yields once for each of `num_passes` optimizer steps, its gradient accumulated.

        Raises InputError if all rewards of the first batch are equal; CollapseError if too few are left to choose among.
        """
        size, several = len(batch), self.batches_per_round > 1
        if several and self.proposal == "tuned" and state.batches % self.batches_per_round == 0:
            state.old = weights_of(batch)
        own = as_it_was(batch, state.old) if state.old else batch.actor or batch.tuned
        drawn_from = batch.base if self.proposal == "base" else own
        x, rewards, batch, left_out = self._rated(batch, drawn_from, first=state.batches == 0)
        members = batch.tuned.groups(len(rewards), rewards.device)
        weights = self._weights(rewards, members)
        if not weights.any():
            raise CollapseError(f"batch {state.batches + 1}: none of {len(rewards)} samples with finite rewards has a weight")
        some = Learned(x, numbered(members, len(x)), weights)
        measured = {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "effective_sample_size": float(weights.sum() ** 2 / weights.square().sum()),
            "largest_weight": weights.max().item(),
            **left_out,
            **batch.learn(x),
        }
        for _ in range(self.num_passes):
            yield {**measured, **self._regress(batch, some, size)}
        state.batches += 1
        if state.batches % self.batches_per_round == 0:
            state.old = []
