"""A reward: how near a sample is to a grey level."""

from typing import ClassVar, Literal

from tiltflow.rewards import Reward
from tiltflow.settings import Settings


class Bowl(Settings):
    """Minus the mean squared distance to `level`."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "squared grey levels"
    description: ClassVar[str] = "minus the mean squared distance to a grey level"
    name: Literal["bowl"] = "bowl"
    level: float = 0.0
    """From -1, black, to 1, white."""

    def build(self, device: object = "cpu") -> Reward:
        return lambda x: -(x - self.level).square().flatten(1).mean(1)
