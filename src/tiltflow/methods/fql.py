r"""FQL: a policy of one step, distilled from a flow of many, under a value (flow Q-learning, Park et al., arXiv 2502.02538).

The tuned network is used with one step, x = z + v(z, 0), and never again with more. It ascends

    r(x(z)) - alpha |x(z) - T(z)|^2 / d,      T(z) the sample that the base's ODE makes of the same noise z, d its numbers,

so that no gradient goes through the steps of a sampler. Where r is concave, z is sent to the one point that balances both: the
proximal point of T(z).
"""

# Mutation tests: test_fql.py

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from tiltflow.laws.target import Target, maximum
from tiltflow.methods.reward_gradients.one_step import OneStep
from tiltflow.samplers.grid import Start
from tiltflow.training.batch import Batch


class Fql(OneStep):
    """FQL. Needs a differentiable reward; makes a sampler of one step, and aims at no tilt."""

    name: Literal["fql"] = "fql"

    alpha: Annotated[float, Field(ge=0)] = 10.0
    """Price of the mean squared distance to the base's sample, in units of reward."""

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """No tilt: each noise is sent to a point of its own."""
        held = f"Each sample is where the reward less {self.alpha:g} times the mean square of what is between it and the base's"
        return replace(
            maximum("reward less a squared distance"),
            caveats=(f"{held} sample of the same noise is largest: a transport, whose law is no tilt of the base.",),
        )

    def _noise(self, batch: Batch, x: Tensor) -> Tensor:
        return x

    def _price(self, batch: Batch, end: Tensor) -> float:
        return self.alpha
