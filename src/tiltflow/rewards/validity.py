"""Whether a sample is a molecule at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch

from tiltflow.chemistry.atoms import Molecule
from tiltflow.chemistry.embedding import rdkit
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.molecules import Computed, OfMolecules, connected
from tiltflow.settings import Settings


class Validity(Settings):
    """1 for one molecule of closed shells without charges, by the bonds that its positions have, and 0 for all else. With
    `sign: invalid` it is the other way round: the cost of a utility with a limit, such as `log-barrier`."""

    differentiable: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "fraction"

    name: Literal["validity"] = "validity"
    sign: Literal["valid", "invalid"] = "valid"
    """Which samples have 1: those that are `valid`, or those that are `invalid`."""

    @property
    def description(self) -> str:
        if self.sign == "valid":
            return "1 for one molecule whose bonds suit its atoms, 0 for anything else"
        return "0 for one molecule whose bonds suit its atoms, 1 for anything else"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Raises InputError if RDKit is not installed."""
        rdkit()
        of_valid = float(self.sign == "valid")

        def compute(molecules: Sequence[Molecule]) -> Iterator[Computed | str]:
            for molecule in molecules:
                yield Computed(of_valid if connected(molecule) is not None else 1 - of_valid)

        return OfMolecules(compute, self.name, 1 - of_valid)
