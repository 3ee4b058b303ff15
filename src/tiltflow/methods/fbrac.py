r"""FBRAC: the gradient of the reward through all steps of the ODE, and flow matching that holds the law near the base.

Flow behaviour-regularised actor-critic, the baseline of that name in arXiv 2502.02538 and 2601.14234:

    loss = - r(x_1) + alpha E |v(x_t, t) - (x_1' - x_0)|^2 / d,      x_1 of the tuned ODE, x_1' of the base, d its numbers.

The second term is that of behaviour cloning, on samples of the base in place of data; here with the base's velocity, the mean
of x_1' - x_0 given x_t, for its target: the same gradient on average, with less noise. **Its law is no tilt of the base:**
raising alpha brings it back to the base along a way of its own.
"""

# Mutation tests: test_fbrac.py

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.laws.target import Target, maximum
from tiltflow.methods import MethodSettings
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs
from tiltflow.training.noising import noising, shuffled
from tiltflow.training.reward_ascent import ascend, follow


class Fbrac(MethodSettings):
    """FBRAC. Needs a differentiable reward; raises its mean against a price of leaving the base's field."""

    name: Literal["fbrac"] = "fbrac"

    alpha: Annotated[float, Field(ge=0)] = 10.0
    """Price of the mean squared change of the velocity at the base's noised samples, in units of reward."""
    num_inference_steps: Annotated[int, Field(ge=1)] = 10
    """Steps of Euler's method, through which the gradient goes."""

    @property
    def sampling(self) -> Sampling:
        """The ODE."""
        return Sampling(solver="euler", num_inference_steps=self.num_inference_steps)

    @property
    def needs(self) -> Needs:
        """The gradient of the reward, which may learn."""
        return Needs(reward_gradient=True, learned_reward=True)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """No tilt of the base."""
        held = (
            f"What holds the model is {self.alpha:g} times a squared change of velocities at samples of the base, which has no"
        )
        return replace(maximum("reward less a change of velocities"), caveats=(f"{held} law that is a tilt for its optimum.",))

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        """No state is kept."""

    def gradients(self, batch: Batch, state: None) -> Iterator[dict[str, float]]:
        """One iteration of the algorithm: one optimizer step, its gradient accumulated. Samples are drawn from `batch.tuned`
        itself, not from an average of its weights: the gradient is that of theirs."""
        chain = self.sampling.chain(batch.start)
        states, end = follow(batch, chain, batch.x[batch.own])
        (x,) = batch.map(lambda some, part: (end[batch.own_part(part)],))
        measured = ascend(batch, chain, states, end)
        cloning = self._cloning(batch)
        measured["loss"] += cloning
        yield {**measured, "cloning_loss": cloning, **batch.learn(x)}

    def _cloning(self, batch: Batch) -> float:
        """Accumulate the gradient of the second term. Returns it, less its part that no training changes."""

        def drawn(some: Batch, part: slice) -> tuple[Tensor]:
            return (sample(some.base, some.x, self.sampling, batch.generator, start=batch.start),)

        (x,) = batch.map(drawn)
        which = shuffled(len(x), len(x), batch.generator)
        pairs = noising(batch.tuned, x, which, self.sampling, batch.generator, start=batch.start)

        def terms_of(part: slice) -> dict[str, Tensor]:
            points = pairs.points(part)
            with torch.no_grad():
                wanted = batch.base.select(points.which)(points.x, points.t)
            misfit = batch.tuned.select(points.which)(points.x, points.t) - wanted
            return {"loss": self.alpha * misfit.flatten(1).square().mean(1)}

        return batch.accumulate(terms_of, len(which), over=len(which))["loss"]
