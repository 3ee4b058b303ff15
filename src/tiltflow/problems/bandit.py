"""A two-armed bandit of continuous actions at several observations: a policy, a known value, and the exact law for each."""

# Mutation tests: test_bandit.py

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import GaussianMixture, mixture
from tiltflow.networks.mlp import Mlp
from tiltflow.problems.verification.at_observations import AtObservations, Value
from tiltflow.streams import new_network

Positive = Annotated[float, Field(gt=0)]


class Bandit(AtObservations):
    """A bandit with two arms of continuous actions at several observations, under a known value.

    Behaviour prefers the worse arm: at an observation s, actions are near -arm and arm, the upper ones with probability
    1 / (1 + exp(s)), and worth Q(s, a) = slope s a - quadratic a^2 / 2.
    """

    name: Literal["bandit"] = "bandit"
    arm: Positive = 0.6
    """Mean of the upper arm; that of the lower is minus it."""
    scale: Positive = 0.3
    """Standard deviation of the actions of an arm."""
    slope: float = 1.5
    """What an action is worth for each unit of the observation."""
    quadratic: Annotated[float, Field(ge=0)] = 0.5
    """What large actions cost."""

    numbers: ClassVar[Sequence[str]] = ("share_of_the_upper_arm",)

    def behaviour(self, s: float) -> GaussianMixture:
        """The law of the actions at an observation."""
        upper = 1 / (1 + math.exp(s))
        return mixture(torch.tensor([[-self.arm], [self.arm]], dtype=torch.float64), (1 - upper, upper), self.scale)

    def base_flow(self) -> Flow:
        """The exact velocity field of the behaviour, a flow that is bound to observations [batch, 1]."""
        return Flow(Arms(self.arm, self.scale))

    def tuned_flow(self, seed: int) -> Flow:
        """The same with a learned correction, zero at the start."""
        return Flow(TunedArms(Arms(self.arm, self.scale), self.hidden, self.layers, seed))

    def reward(self) -> Value:
        """Q at the observations that it is bound to."""
        return Value(self.slope, self.quadratic)

    def further(self, law: GaussianMixture, actions: Tensor) -> dict[str, float]:
        """The share of the upper arm."""
        (name,), share = self.numbers, mean_estimate((actions[:, 0] > 0).double())
        return {name: share.value, f"{name}_error": share.standard_error, f"{name}_exact": upper_arm(law)}


def upper_arm(law: GaussianMixture) -> float:
    """The probability of an action above 0."""
    below = torch.special.ndtr(-law.means[:, 0] / law.variances.sqrt())
    return float((law.log_weights.exp() * (1 - below)).sum())


class Arms(nn.Module):
    """The velocity (x [batch, 1], time [batch], observations [batch, 1]) -> [batch, 1] of two arms."""

    def __init__(self, arm: float, scale: float):
        super().__init__()
        self.arm, self.variance = arm, scale**2

    def forward(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        return self.velocity_and_upper(x, time, seen)[0]

    def velocity_and_upper(self, x: Tensor, time: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity, and the probability [batch, 1] that the action will be one of the upper arm."""
        t = time[:, None]
        total = t**2 * self.variance + (1 - t) ** 2
        # log densities of the arms differ by 2 t arm x / total, and log weights by -s
        upper = torch.sigmoid(2 * t * self.arm * x / total - seen)
        mean = self.arm * (2 * upper - 1)
        return mean + (t * self.variance - (1 - t)) / total * (x - t * mean), upper


class TunedArms(nn.Module):
    """The same with a learned correction, zero at the start: a number, a multiple of x and one of the velocity."""

    def __init__(self, arms: Arms, hidden: int, layers: int, seed: int):
        super().__init__()
        self.arms = arms
        self.correction = new_network(Mlp(dimension=3, outputs=3, hidden=hidden, layers=layers), seed)

    def forward(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        velocity, upper = self.arms.velocity_and_upper(x, time, seen)
        number, of_x, of_velocity = self.correction(torch.cat([x, upper, seen], 1), time).split(1, 1)
        return velocity + number + of_x * x + of_velocity * velocity  # type: ignore[no-any-return]
