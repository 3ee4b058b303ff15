r"""FQL: a policy of one step, distilled from a flow of many, under a value (flow Q-learning, Park et al., arXiv 2502.02538).

The tuned network is used with one step, x = z + v(z, 0), and never again with more. It ascends

    r(x(z)) - alpha |x(z) - T(z)|^2 / d,      T(z) the sample that the base's ODE makes of the same noise z, d its numbers,

so that no gradient goes through the steps of a sampler. Where r is concave, z is sent to the one point that balances both: the
proximal point of T(z). With `toward: behaviour` T(z) is a sample of noise of its own, and what is balanced is the squared
distance to all of the base's law, with one point as the answer: the penalty of ReBRAC's actor (Tarasov et al., 2305.09836).
"""

# Mutation tests: test_fql.py

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.flows.field import Which
from tiltflow.laws.target import Target, maximum
from tiltflow.methods import MethodSettings
from tiltflow.rewards import Reward, select
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import normal
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs
from tiltflow.training.reward_ascent import ascend, follow


class Fql(MethodSettings):
    """FQL. Needs a differentiable reward; makes a sampler of one step, and aims at no tilt."""

    name: Literal["fql"] = "fql"

    alpha: Annotated[float, Field(ge=0)] = 10.0
    """Price of the mean squared distance to the base's sample, in units of reward."""
    num_inference_steps: Annotated[int, Field(ge=1)] = 10
    """Steps of Euler's method by which the base's sample is drawn."""
    toward: Literal["flow", "behaviour"] = "flow"
    """flow: the base's sample of the same noise. behaviour: one of other noise, as ReBRAC's actor is held near the actions of
    the data; the policy then has one action."""

    @property
    def sampling(self) -> Sampling:
        """One step."""
        return Sampling(solver="euler", num_inference_steps=1)

    @property
    def needs(self) -> Needs:
        """The gradient of the reward, which may learn."""
        return Needs(reward_gradient=True, learned_reward=True)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """No tilt: each noise is sent to a point of its own."""
        whose = "the same noise" if self.toward == "flow" else "other noise"
        held = f"Each sample is where the reward less {self.alpha:g} times the mean square of what is between it and the base's"
        return replace(
            maximum("reward less a squared distance"),
            caveats=(f"{held} sample of {whose} is largest: a transport, whose law is no tilt of the base.",),
        )

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        """No state is kept."""

    def gradients(self, batch: Batch, state: None) -> Iterator[dict[str, float]]:
        """One iteration of the algorithm: one optimizer step, its gradient accumulated. Samples are drawn from `batch.tuned`
        itself, not from an average of its weights: the gradient is that of theirs."""
        x, chain = batch.x[batch.own], self.sampling.chain(batch.start)
        base, _ = batch.own_field(batch.base)
        z = x if self.toward == "flow" else base.project(normal(x.shape, batch.own_noise, x.dtype))
        of_base = Sampling(solver="euler", num_inference_steps=self.num_inference_steps)
        ends = sample(base, z, of_base, batch.own_noise, start=batch.start)
        states, end = follow(batch, chain, x)
        (wanted,) = batch.map(lambda some, part: (ends[batch.own_part(part)],))
        (there,) = batch.map(lambda some, part: (end[batch.own_part(part)],))
        measured = ascend(replace(batch, reward=Near(batch.reward, wanted, self.alpha)), chain, states, end)
        distance = (there - wanted).square().mean().item()
        measured["reward"] += self.alpha * distance
        yield {**measured, "distance_to_base_sample": distance, **batch.learn(there)}


@dataclass(frozen=True)
class Near:
    """A reward less `alpha` times the mean squared distance to a point of each sample [batch, *event]."""

    reward: Reward
    points: Tensor
    alpha: float

    def select(self, which: Which) -> Near:
        """The reward of these samples of the batch."""
        return replace(self, reward=select(self.reward, which), points=self.points[which])

    def __call__(self, x: Tensor) -> Tensor:
        return self.reward(x) - self.alpha * (x - self.points).flatten(1).square().mean(1)
