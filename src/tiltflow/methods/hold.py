"""The model as it is, while a reward that learns does: critics of the behaviour itself, to choose among its samples by.

With `q-function` and its `best_of` these are the critics of IFQL (best of n; arXiv 2502.02538), whose policy is never trained.
"""

# Mutation tests: test_hold.py

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.laws.target import Target
from tiltflow.methods import MethodSettings
from tiltflow.rewards.functions.checked import evaluate
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs


class Hold(MethodSettings):
    """Changes nothing in the model. For a reward that learns while it trains."""

    name: Literal["hold"] = "hold"

    num_inference_steps: Annotated[int, Field(ge=1)] = 10
    """Steps of Euler's method, by which the samples are drawn that the reward is measured on."""

    @property
    def sampling(self) -> Sampling:
        """The ODE."""
        return Sampling(solver="euler", num_inference_steps=self.num_inference_steps)

    @property
    def needs(self) -> Needs:
        """Takes any reward, which may learn."""
        return Needs(learned_reward=True)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """The base."""
        return Target(log_tilt=lambda rewards: 0 * rewards.double(), words="p_base(x)", reaches="none")

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        """No state is kept."""

    def gradients(self, batch: Batch, state: None) -> Iterator[dict[str, float]]:
        """Draw samples, and let the reward learn: an optimizer step without a gradient."""

        @torch.no_grad()
        def drawn(some: Batch, part: slice) -> tuple[Tensor, Tensor]:
            x = sample(some.tuned, some.x, self.sampling, batch.generator, start=batch.start)
            return x, evaluate(some.reward, x, some.non_finite)

        x, rewards = batch.map(drawn, dims=(0, 0))
        known = rewards[rewards.isfinite()]
        measured = {"reward": known.mean().item(), "reward_std": known.std(correction=0).item(), "loss": 0.0}
        yield {**measured, **batch.learn(x)}
