"""Methods, one paper and one file each: a class of settings named after the file, with `gradients()`.

`gradients(batch, state)` is a generator: at each yield it has added the gradient of one optimizer step to the parameters of
`batch.tuned`, and hands out what it measured. A `tiltflow.training.batch.Batch` has all that it needs for an iteration; `state`
is what `new_state` has made, kept from batch to batch.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from tiltflow.optimization import Optimization
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Start

Positive = Annotated[float, Field(gt=0)]


class Tilting(Optimization):
    """Part of the settings of every method that aims at p_base(x) exp(r(x) / beta)."""

    beta: Positive = 1.0
    """Temperature of the tilt, in units of reward: small follows the reward, large stays with the base. It is the price of a
    nat of path KL."""

    def log_tilt(self, rewards: Tensor, steps: int) -> Tensor:
        """log of the density that the law aimed at has over p_base, up to a constant, where the rewards are these: [batch]."""
        return rewards.double() / self.beta

    def target_law(self, steps: int) -> str:
        """The law that the method aims at, in words."""
        return "p_base(x) exp(r(x) / beta)"

    def priced_chain(self, start: Start = 0.0) -> tuple[Chain, Tensor] | None:
        """The chain from time `start` whose control is what is optimised, and the price of a change of its velocities, [K], as
        `Chain.energy` says it, 0 where a step is not controlled. None where there is no such chain."""
        return None
