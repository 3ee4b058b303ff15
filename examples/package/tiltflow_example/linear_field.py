"""A network: a linear map."""

from typing import Literal

from torch import Tensor, nn

from tiltflow.settings import Settings


class Linear(nn.Linear):
    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return super().forward(x)


class LinearField(Settings):
    """The same at every time."""

    name: Literal["linear-field"] = "linear-field"
    dimension: int = 2
    """Of x."""

    def build(self) -> nn.Module:
        return Linear(self.dimension, self.dimension)
