"""How well a molecule dissolves in fat rather than in water."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from tiltflow.chemistry.embedding import rdkit
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.molecules import OfMolecules, of_structure
from tiltflow.settings import Settings


class Logp(Settings):
    """log10 of the partition between octanol and water, by Crippen's contributions of atoms (Wildman and Crippen, doi
    10.1021/ci990307l), by RDKit, of the structure that the positions of the atoms have."""

    differentiable: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "log units"

    name: Literal["logp"] = "logp"
    failure_value: float | None = -10.0
    """Reward of what is no molecule of one part, by default below all small molecules; null for NaN."""

    @property
    def description(self) -> str:
        return "log10 of the partition between octanol and water by Crippen's rules; higher in fatty molecules"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Raises InputError if RDKit is not installed."""
        rdkit()
        from rdkit.Chem import Crippen

        value = float("nan") if self.failure_value is None else self.failure_value
        return OfMolecules(of_structure(Crippen.MolLogP), self.name, value)  # type: ignore[attr-defined]
