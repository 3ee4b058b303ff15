"""A policy, from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from tiltflow.models.policy import Policy as PolicyModel
from tiltflow.models.policy import load_policy
from tiltflow.models.sources.network import Network


class Policy(Network):
    """A policy: a flow of chunks of actions given an observation."""

    name: Literal["policy"] = "policy"  # type: ignore[assignment]

    prompted: ClassVar[bool] = True

    def load(self, device: str) -> PolicyModel:
        """Load the untuned policy. Raises InputError if it cannot be loaded."""
        return load_policy(self.path, device)

    def load_tuned(self, base: PolicyModel, folder: Path, seed: int) -> tuple[PolicyModel, PolicyModel]:  # type: ignore[override]
        """Return (base, tuned) of a run with its tuned policy in `folder`. Raises InputError if it cannot be loaded."""
        return base, load_policy(folder, base.device)
