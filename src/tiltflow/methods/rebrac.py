r"""ReBRAC: one action for an observation, of a large value, near those of the behaviour (Tarasov et al., arXiv 2305.09836).

The tuned network is used with one step, x = z + v(z, 0). It ascends, m the mean |r| of the batch, held fixed,

    r(x) / m - alpha |x - a|^2,      a ~ base,

a drawn independently of z: the mean of |x - a|^2 is |x - E a|^2 and a number, so that all noise is sent to one point. The
second penalty of the paper is that of its critics, whose targets lose a price times |a' - b'|^2, a' the next action of the
policy and b' that of the data: `distance_price` of the reward `q-function`.

Other than published: a is a sample of the base at a state, not the action of the data there; the policy sees noise, which it
learns to ignore, and there is no further noise in targets; the policy takes a step for each of the critics, not every other.
"""

# Mutation tests: test_rebrac.py

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.laws.target import Target, maximum
from tiltflow.methods.reward_gradients.one_step import OneStep
from tiltflow.rewards.functions.checked import evaluate
from tiltflow.samplers.grid import Start
from tiltflow.streams import normal
from tiltflow.training.batch import Batch


class Rebrac(OneStep):
    """ReBRAC's actor. Needs a differentiable reward; makes a sampler of one step and one sample, and aims at no law."""

    name: Literal["rebrac"] = "rebrac"

    alpha: Annotated[float, Field(ge=0)] = 0.1
    """Price of the squared distance to samples of the base, in units of the mean size of the reward."""

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """No law: one point."""
        held = (
            f"All noise is sent to the point where the reward less {self.alpha:g} times its mean size for the squared distance"
        )
        return replace(
            maximum("reward less a squared distance"),
            caveats=(f"{held} to samples of the base is largest: one point for a condition, and no tilt of the base.",),
        )

    def _noise(self, batch: Batch, x: Tensor) -> Tensor:
        return batch.base.select(batch.own).project(normal(x.shape, batch.own_noise, x.dtype))

    @torch.no_grad()
    def _price(self, batch: Batch, end: Tensor) -> float:
        """alpha m d, d the numbers of a sample: the objective times m, of the mean square."""
        (rewards,) = batch.map(lambda some, part: (evaluate(some.reward, end[part], some.non_finite),))
        return self.alpha * end[0].numel() * rewards[rewards.isfinite()].abs().mean().item()
