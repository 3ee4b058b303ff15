"""How easily a molecule could be made."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from tiltflow.chemistry.embedding import rdkit
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.molecules import OfMolecules, of_structure
from tiltflow.settings import Settings


class SaScore(Settings):
    """Minus the score of synthetic accessibility (Ertl and Schuffenhauer, doi 10.1186/1758-2946-1-8), by RDKit, of the
    structure that the positions of the atoms have: -1 for easy, -10 for hard."""

    differentiable: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "points"

    name: Literal["sa-score"] = "sa-score"
    failure_value: float | None = -10.0
    """Reward of what is no molecule of one part: -10 is that of the hardest; null for NaN."""

    @property
    def description(self) -> str:
        return "minus the score of synthetic accessibility, from -10 (hard to make) to -1 (easy)"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Raises InputError if RDKit is not installed."""
        rdkit()
        from rdkit.Contrib.SA_Score import sascorer

        def easiness(molecule: Any) -> float:
            return -float(sascorer.calculateScore(molecule))

        return OfMolecules(
            of_structure(easiness), self.name, float("nan") if self.failure_value is None else self.failure_value
        )
