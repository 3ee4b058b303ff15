"""Likeness of a molecule to drugs."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from tiltflow.chemistry.embedding import rdkit
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.molecules import OfMolecules, of_structure
from tiltflow.settings import Settings


class Qed(Settings):
    """QED (Bickerton et al., doi 10.1038/nchem.1243), by RDKit, of the structure that the positions of the atoms have."""

    differentiable: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "QED"

    name: Literal["qed"] = "qed"
    failure_value: float | None = 0.0
    """Reward of what is no molecule of one part: 0 is below all molecules; null for NaN."""

    @property
    def description(self) -> str:
        return "QED, the likeness of the molecule to drugs, from 0 to 1"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Raises InputError if RDKit is not installed."""
        rdkit()
        from rdkit.Chem import QED

        return OfMolecules(of_structure(QED.qed), self.name, float("nan") if self.failure_value is None else self.failure_value)
