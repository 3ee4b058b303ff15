"""A flow at the moving average of its weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from tiltflow.flows.field import Wrapper
from tiltflow.optimization import WeightAverage


@dataclass(frozen=True)
class Averaged(Wrapper):
    """The field of a flow whose weights are replaced by their moving average in each evaluation."""

    average: WeightAverage

    def own_weights(self) -> AbstractContextManager[None]:
        """The weights are their average in this context."""
        return self.average.applied()
