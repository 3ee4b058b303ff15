"""What one iteration starts from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tiltflow.flows.field import VelocityField
from tiltflow.flows.guided import Guide
from tiltflow.rewards import Reward


@dataclass(frozen=True)
class Batch:
    """What one iteration starts from.

    Args:
        x: starting points [batch, *event].
        bind: binds the conditions of the batch to a flow; may guide it (`guidance_mode: full`).
        guide: guides the flow that draws the samples, and not what is learned from them (`guidance_mode: rollout`).
        reward: the reward of these samples, if it is bound to their prompts.
    """

    x: Tensor
    bind: Callable[[VelocityField], VelocityField] = lambda flow: flow
    guide: Guide | None = None
    reward: Reward | None = None
