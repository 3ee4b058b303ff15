"""How strongly the atoms of a molecule are bound: minus its energy by xTB."""

# Mutation tests: test_xtb.py

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from tiltflow.chemistry.xtb import Hamiltonian
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.molecules import Computed, OfMolecules, by_xtb
from tiltflow.settings import Settings

SHARES: dict[Hamiltonian, tuple[float, ...]] = {
    "gfn1": (0.5556, 2.0818, 3.1888, 4.7011, 5.1630),
    "gfn2": (0.5237, 2.1111, 2.9206, 4.0663, 4.7513),
}
"""Hartree by which an atom of H, C, N, O and F lowers the energy of a molecule: a least-squares fit to 899 molecules of
QM9, which leaves 0.03 % and 0.05 % of the variance, `python benchmarks/molecules.py composition qm9_smiles.csv`."""


class XtbEnergy(Settings):
    """-E of a molecule by GFN1-xTB (doi 10.1021/acs.jctc.7b00118) or GFN2-xTB (10.1021/acs.jctc.8b01176), by tblite, at the
    positions that it has.

    Most of it says which atoms there are: more atoms, and heavier ones, have a lower energy. The gradient in the positions is
    xTB's own. The energy is that of the nearest elements, so in the types it is constant but for jumps; as laws live where
    types are one-hot, any continuation off it names the same tilt, and the one here is linear, by what each element adds.
    """

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "hartree"

    name: Literal["xtb-energy"] = "xtb-energy"
    method: Hamiltonian = "gfn1"
    """`gfn1`, or `gfn2`."""
    failure_value: float | None = 0.0
    """Reward, in hartree, of what has no energy: 0 is that of no atoms at all, below all molecules; null for NaN."""
    type_gradient: bool = True
    """Whether the gradient has a part in the types of atoms, by which methods with adjoints feel the composition."""
    max_gradient_norm: Annotated[float, Field(gt=0)] | None = 10.0
    """Longest gradient in the positions of a molecule, in hartree/Å; null for no limit. It is about 0.1 for molecules
    whose force field is at rest, about 1 where atoms are moved by 0.1 Å (8 at most, of 500 molecules), and without a limit for
    atoms that lie over each other: `python benchmarks/molecules.py gradients`."""
    max_iterations: Annotated[int, Field(ge=1)] = 100
    """Iterations after which a calculation has failed."""
    num_workers: Annotated[int, Field(ge=1)] | None = None
    """Processes that compute in parallel; by default one to a core."""

    @property
    def description(self) -> str:
        return f"minus the energy of the molecule by {self.method.upper()}-xTB, unrelaxed; more and heavier atoms have more"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Raises InputError if tblite is not installed."""
        return OfMolecules(
            by_xtb(lambda found: Computed(-found.energy, -found.gradient), self.method, self.max_iterations, self.num_workers),
            self.name,
            float("nan") if self.failure_value is None else self.failure_value,
            SHARES[self.method] if self.type_gradient else None,
            self.max_gradient_norm,
        )
