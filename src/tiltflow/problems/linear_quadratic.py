r"""A linear system with quadratic costs, a Gaussian policy of feedback, and its value in closed form: exact laws of actions.

    s' = drift s + gain a,      cost (state_cost s^2 + action_cost a^2) / 2 a step,      behaviour a ~ N(-feedback s, scale^2).

The behaviour's value is V(s) = -p s^2 / 2 + a number, of one linear equation,

    p = state_cost + action_cost feedback^2 + discount p (drift - gain feedback)^2,

so that Q(s, a) = -(state_cost s^2 + action_cost a^2 + discount p (drift s + gain a)^2) / 2 + a number is quadratic in a, and
behaviour exp(Q / beta) is a Gaussian for each s.
"""

# Mutation tests: test_linear_quadratic.py

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import GaussianMixture, mixture
from tiltflow.networks.mlp import Mlp
from tiltflow.problems.verification.at_observations import AtObservations, Value
from tiltflow.streams import new_network

Positive = Annotated[float, Field(gt=0)]


class LinearQuadratic(AtObservations):
    """A regulator that is improved: Gaussian actions, a feedback of the state, under the quadratic value of that policy."""

    name: Literal["linear-quadratic"] = "linear-quadratic"
    observations: Annotated[tuple[float, ...], Field(min_length=1)] = (-1.5, 0.5, 1.0)
    """States s, each a number."""
    drift: float = 1.1
    """What becomes of the state in a step without an action, for each unit of it."""
    gain: float = 0.5
    """What an action adds to the state."""
    feedback: float = 0.4
    """The behaviour's mean action is minus this times the state."""
    scale: Positive = 0.6
    """Standard deviation of the behaviour's actions."""
    state_cost: Annotated[float, Field(ge=0)] = 1.0
    """Twice the cost of a state of 1."""
    action_cost: Annotated[float, Field(ge=0)] = 0.3
    """Twice the cost of an action of 1."""
    discount: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """What a cost counts one step later."""

    numbers: ClassVar[Sequence[str]] = ("mean_action",)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.discount * self._closed**2 >= 1:
            raise ValueError("drift - gain feedback: the behaviour's state grows faster than its cost is discounted")
        return self

    @property
    def _closed(self) -> float:
        """What becomes of the state in a step under the mean action."""
        return self.drift - self.gain * self.feedback

    @property
    def curvature(self) -> float:
        """p of the behaviour's value -p s^2 / 2."""
        return (self.state_cost + self.action_cost * self.feedback**2) / (1 - self.discount * self._closed**2)

    def behaviour(self, s: float) -> GaussianMixture:
        """The law of the actions at a state."""
        return mixture(torch.tensor([[-self.feedback * s]], dtype=torch.float64), (1.0,), self.scale)

    def reward(self) -> Value:
        """Q at the states that it is bound to, less what does not depend on the action."""
        after = self.discount * self.curvature
        return Value(-after * self.drift * self.gain, self.action_cost + after * self.gain**2)

    def base_flow(self) -> Flow:
        """The exact velocity field of the behaviour, a flow that is bound to states [batch, 1]."""
        return Flow(Feedback(self.feedback, self.scale))

    def tuned_flow(self, seed: int) -> Flow:
        """The same with a learned correction, zero at the start."""
        correction = new_network(Mlp(dimension=2, outputs=2, hidden=self.hidden, layers=self.layers), seed)
        return Flow(Feedback(self.feedback, self.scale, correction))

    def further(self, law: GaussianMixture, actions: Tensor) -> dict[str, float]:
        """The mean action."""
        (name,), mean = self.numbers, mean_estimate(actions[:, 0].double())
        return {name: mean.value, f"{name}_error": mean.standard_error, f"{name}_exact": law.mean.item()}


class Feedback(nn.Module):
    """The velocity (x [batch, 1], time [batch], states [batch, 1]) -> [batch, 1] of N(-feedback s, scale^2); and, learned, a
    number and a multiple of x."""

    def __init__(self, feedback: float, scale: float, correction: nn.Module | None = None):
        super().__init__()
        self.feedback, self.variance, self.correction = feedback, scale**2, correction

    def forward(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        t, mean = time[:, None], -self.feedback * seen
        velocity = mean + (t * self.variance - (1 - t)) / (t**2 * self.variance + (1 - t) ** 2) * (x - t * mean)
        if self.correction is None:
            return velocity
        number, of_x = self.correction(torch.cat([x, seen], 1), time).split(1, 1)
        return velocity + number + of_x * x  # type: ignore[no-any-return]
