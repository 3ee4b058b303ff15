"""Dipole moment of a molecule, by xTB."""

# Mutation tests: test_xtb.py

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from tiltflow.chemistry.xtb import Hamiltonian
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.molecules import Computed, OfMolecules, by_xtb
from tiltflow.settings import Settings


class Dipole(Settings):
    """Length of the dipole moment by GFN1-xTB or GFN2-xTB, by tblite. It has no gradient: tblite gives none of a dipole, and
    differences would take six calculations an atom."""

    differentiable: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "debye"

    name: Literal["dipole"] = "dipole"
    method: Hamiltonian = "gfn2"
    """`gfn1`, or `gfn2`, which has dipoles of atoms too."""
    failure_value: float | None = 0.0
    """Reward of what has no dipole, in debye: 0 is the least that there is; null for NaN."""
    max_iterations: Annotated[int, Field(ge=1)] = 100
    """Iterations after which a calculation has failed."""
    num_workers: Annotated[int, Field(ge=1)] | None = None
    """Processes that compute in parallel; by default one to a core."""

    @property
    def description(self) -> str:
        return f"length of the dipole moment of the molecule by {self.method.upper()}-xTB, unrelaxed"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Raises InputError if tblite is not installed."""
        return OfMolecules(
            by_xtb(
                lambda found: Computed(float(np.linalg.norm(found.dipole))), self.method, self.max_iterations, self.num_workers
            ),
            self.name,
            float("nan") if self.failure_value is None else self.failure_value,
        )
