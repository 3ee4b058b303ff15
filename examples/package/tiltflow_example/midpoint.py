"""A solver: the midpoint method."""

from torch import Tensor

from tiltflow.flows.field import Velocity
from tiltflow.samplers.solver import OdeSolver


class Midpoint(OdeSolver):
    """The probability-flow ODE by the midpoint method."""

    order = 2

    def states(self, velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
        states = [x]
        for t, h in zip(times, times.diff(), strict=False):
            half = states[-1] + h / 2 * velocity(states[-1], t)
            states.append(states[-1] + h * velocity(half, t + h / 2))
        return states
