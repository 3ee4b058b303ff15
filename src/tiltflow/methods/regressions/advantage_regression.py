r"""Regression on advantages around the base: RAM, AWM and ADRPO, which differ in what a sample's velocity is compared with.

With A = r - mean r among the samples of a prompt, class or batch, and c = A / beta,

    d = v_base - v + c (u - v_residual).

It is the tilting identity d v / d eta = Cov_eta(r, u | x_t) with the whole step, from 0 to 1 / beta, at its end: the law is the
tilt to first order in 1 / beta, and milder beyond.
"""

# Mutation tests: test_advantage_regressions.py

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tiltflow.laws.forward_process import ram
from tiltflow.laws.law import Law
from tiltflow.laws.target import RewardAt, Target, exponential_tilt
from tiltflow.methods import Tempered
from tiltflow.methods.regressions.drawn_samples import Rounds
from tiltflow.methods.regressions.forward_process import Learned, Regression, numbered
from tiltflow.samplers.grid import Start
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs

POLE = -0.9
"""The least c around the network itself: at -1 the regression has no minimum."""


def advantages(rewards: Tensor, members: list[Tensor], *, standardize: bool = False) -> Tensor:
    """r - mean r of the samples of each condition, over their standard deviation or not [n], float64."""
    found = torch.empty(len(rewards), dtype=torch.float64)
    for some in (each.cpu() for each in members):
        found[some] = (own := rewards.double().cpu()[some]) - own.mean()
        if standardize and float(std := own.std(correction=0)) > 0:
            found[some] /= std
    return found


class AdvantageRegression(Regression, Tempered):
    """Part of the settings of the methods that regress on advantages around the base."""

    @property
    @abstractmethod
    def _residual(self) -> Literal["network", "anchor"]:
        """Whether the velocity of a sample is compared with the network's own, or with that of the base."""

    @property
    def needs(self) -> Needs:
        """Takes any reward."""
        return Needs(passes=self.num_passes)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """p_base exp(r / beta), to first order in 1 / beta."""
        once = "The advantage is taken once, linearly and around the base: the law is the tilt to first order in 1 / beta"
        if self._residual == "network":
            once += ", and milder beyond. Advantages below -0.9 beta are clipped, as the regression has no minimum there."
        else:
            once += ", and exactly for a linear reward on a Gaussian, in the first round alone."
        return replace(exponential_tilt(self.beta, [once], "first-order"), exact=self._settled_law)

    def _settled_law(self, base: Law, reward: RewardAt) -> Law:
        """The law at which rounds settle, on the line. Raises ValueError where none is found."""
        return ram(base, reward, self.beta, self._residual, lowest=POLE if self._residual == "network" else -math.inf)

    def gradients(self, batch: Batch, state: Rounds) -> Iterator[dict[str, float]]:
        """One round: yields once for each of `num_passes` optimizer steps, its gradient accumulated.

        Raises InputError if all rewards of the first batch are equal.
        """
        size = len(batch)
        x, rewards, batch, left_out = self._rated(batch, batch.actor or batch.tuned, first=state.batches == 0)
        members = batch.tuned.groups(len(rewards), rewards.device)
        gain = advantages(rewards, members) / self.beta
        if self._residual == "network":
            gain = gain.clamp(min=POLE)
        residual = None if self._residual == "network" else batch.base
        some = Learned(x, numbered(members, len(x)), gain, [(torch.ones_like(gain), batch.base)], residual)
        measured = {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "largest_weight": (1 + gain).abs().max().item(),
            **left_out,
        }
        for _ in range(self.num_passes):
            yield {**measured, **self._regress(batch, some, size)}
        state.batches += 1
