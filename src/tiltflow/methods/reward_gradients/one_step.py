"""Policies of one step that ascend a value, held near samples of the base: what `fql` and `rebrac` share."""

# Mutation tests: test_fql.py test_rebrac.py

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.flows.field import Which
from tiltflow.methods import MethodSettings
from tiltflow.rewards import Reward, select
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs
from tiltflow.training.reward_ascent import ascend, follow


class OneStep(MethodSettings):
    """Part of the settings of both."""

    num_inference_steps: Annotated[int, Field(ge=1)] = 10
    """Steps of Euler's method by which the base's sample is drawn."""

    @property
    def sampling(self) -> Sampling:
        """One step."""
        return Sampling(solver="euler", num_inference_steps=1)

    @property
    def needs(self) -> Needs:
        """The gradient of the reward, which may learn."""
        return Needs(reward_gradient=True, learned_reward=True)

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        """No state is kept."""

    @abstractmethod
    def _noise(self, batch: Batch, x: Tensor) -> Tensor:
        """The noise [own, *event] that the base's samples are made of, beside that of the policy's, x."""

    @abstractmethod
    def _price(self, batch: Batch, end: Tensor) -> float:
        """Price of the mean squared distance to them, in units of reward, of samples [own, *event] of the policy."""

    def gradients(self, batch: Batch, state: None) -> Iterator[dict[str, float]]:
        """One iteration of the algorithm: one optimizer step, its gradient accumulated. Samples are drawn from `batch.tuned`
        itself, not from an average of its weights: the gradient is that of theirs."""
        x, chain = batch.x[batch.own], self.sampling.chain(batch.start)
        base, _ = batch.own_field(batch.base)
        of_base = Sampling(solver="euler", num_inference_steps=self.num_inference_steps)
        ends = sample(base, self._noise(batch, x), of_base, batch.own_noise, start=batch.start)
        states, end = follow(batch, chain, x)
        (wanted,) = batch.map(lambda some, part: (ends[batch.own_part(part)],))
        (there,) = batch.map(lambda some, part: (end[batch.own_part(part)],))
        price = self._price(batch, there)
        measured = ascend(replace(batch, reward=Near(batch.reward, wanted, price)), chain, states, end)
        distance = (there - wanted).square().mean().item()
        measured["reward"] += price * distance
        yield {**measured, "distance_to_base_sample": distance, **batch.learn(there)}


@dataclass(frozen=True)
class Near:
    """A reward less `price` times the mean squared distance to a point of each sample [batch, *event]."""

    reward: Reward
    points: Tensor
    price: float

    def select(self, which: Which) -> Near:
        """The reward of these samples of the batch."""
        return replace(self, reward=select(self.reward, which), points=self.points[which])

    def __call__(self, x: Tensor) -> Tensor:
        return self.reward(x) - self.price * (x - self.points).flatten(1).square().mean(1)
