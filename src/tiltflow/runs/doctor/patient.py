"""A recipe with its parts in memory, for the checks of the doctor, and a finding of one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.evaluation.samples import Asked, Instruments
from tiltflow.flows.adapter import AdapterOff
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.field import VelocityField
from tiltflow.flows.flow import Flow
from tiltflow.laws.target import Target
from tiltflow.models.protocol import GenerativeModel
from tiltflow.rewards import Reward, select
from tiltflow.rewards.functions.checked import evaluate
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import sample
from tiltflow.streams import stream
from tiltflow.training.batch import Drawn
from tiltflow.training.method import Method
from tiltflow.training.trainer import Record

Level = Literal["green", "amber", "red"]
MOST = 64
"""The largest number of samples that a check looks at."""


@dataclass(frozen=True)
class Finding:
    """The result of a check: its level, a sentence, and for amber and red a remedy; for some, the numbers behind it."""

    check: str
    level: Level
    text: str
    remedy: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Patient:
    """A recipe with its parts in memory.

    Args:
        batch: the start of an iteration.
        model: the base.
        items: what samples are asked for.
        instruments: what samples are measured with.
        asked: the samples of the evaluation.
        loop: the training loop; each call begins a new one.
        unit: of the reward.
    """

    recipe: CommonRecipe
    tuned: Flow
    base: Flow | AdapterOff
    reward: Reward
    batch: Drawn
    start: Start
    device: torch.device
    model: GenerativeModel
    items: Sequence[Item]
    instruments: Instruments
    asked: Asked
    loop: Callable[..., Generator[Record, None, None]]
    unit: str

    @property
    def method(self) -> Method:
        """The method of the recipe."""
        return self.recipe.method

    @property
    def target(self) -> Target:
        """The target law at the end of the run."""
        return self.method.target(self.recipe.training.max_train_steps, self.start)

    @property
    def size(self) -> int:
        """The number of samples that a check looks at."""
        return min(len(self.batch.x), MOST)

    @property
    def few(self) -> slice:
        """The first `size` samples of the batch."""
        return slice(self.size)

    def bound(self, flow: VelocityField) -> VelocityField:
        """Bind a flow to the conditions of the first samples of the batch, evaluated in micro-batches."""
        return in_chunks(self.batch.bind(flow).select(self.few), self.recipe.training.micro_batch_size)

    @property
    def bound_reward(self) -> Reward:
        """The reward, bound to the first samples of the batch."""
        return select(self.batch.reward or self.reward, self.few)

    @torch.no_grad()
    def rewards(self, x: Tensor, which: slice | None = None) -> Tensor:
        """Rewards [len(x)] of samples that belong to the first of the batch, or to `which` of them: NaN where one is not finite
        and is dropped."""
        reward = self.bound_reward if which is None else select(self.bound_reward, which)
        return evaluate(reward, x, self.recipe.training.non_finite_rewards)

    def samples(self) -> Tensor:
        """Draw samples of the base, as training does: [size, *event]."""
        generator = stream(self.recipe.seed, "doctor", device=self.device)
        with torch.no_grad():
            return sample(self.bound(self.base), self.batch.x[self.few], self.method.sampling, generator, start=self.start)
