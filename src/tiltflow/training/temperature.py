"""The working temperature of a run, where it is adapted while the model trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Temperature(Protocol):
    """Adapts the temperature that a method works at, from batch to batch: by the mean reward (`calibration`) or by the KL
    divergence from the base (`kl_budget`)."""

    @property
    def working_beta(self) -> float:
        """The temperature to run at, in units of reward."""
        ...

    @property
    def at_limit(self) -> bool:
        """True where a limit holds the temperature back."""
        ...

    def update(self, measured: Mapping[str, float], step: int) -> None:
        """Adapt the temperature to the metrics of a batch, the optimizer steps on which end at `step`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Resume from a state."""
        ...
