"""A flow at other weights: their moving average, or a copy of an earlier time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from tiltflow.flows.field import Wrapper
from tiltflow.optimization import StoredWeights


@dataclass(frozen=True)
class AtWeights(Wrapper):
    """The field of a flow whose weights are replaced by others in each evaluation."""

    weights: StoredWeights

    def own_weights(self) -> AbstractContextManager[None]:
        """The weights are the others in this context."""
        return self.weights.applied()
