"""How little a molecule is strained: minus its energy by a force field."""

# Mutation tests: test_rewards_of_molecules.py

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from tiltflow.chemistry.atoms import Molecule
from tiltflow.chemistry.bonds import bonded
from tiltflow.chemistry.embedding import rdkit
from tiltflow.chemistry.relaxation import MOST_STEPS
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.molecules import Computed, OfMolecules
from tiltflow.settings import Settings


class MmffEnergy(Settings):
    """-E of a molecule by the force field MMFF94 (doi 10.1002/(SICI)1096-987X(199604)17:5/6<490::AID-JCC1>3.0.CO;2-P), by
    RDKit, at the positions that it has. Energies of different molecules cannot be compared.

    The bonds are read from the positions: the gradient is that of the force field with these bonds. With `strain: true` it is
    the energy above the nearest minimum, which the force field finds in some milliseconds: it has the same gradient, and those
    of different molecules can be compared.
    """

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "kcal/mol"

    name: Literal["mmff-energy"] = "mmff-energy"
    strain: bool = False
    """Whether energies count from the nearest minimum, and not from that of the force field."""
    failure_value: float | None = -1000.0
    """Reward of what has no bonds or no parameters, in kcal/mol: below molecules that are strained but whole; null for NaN."""
    max_gradient_norm: Annotated[float, Field(gt=0)] | None = 6000.0
    """Longest gradient of a molecule, in kcal/mol/Å; null for no limit. By default about that of `xtb-energy`."""

    @property
    def description(self) -> str:
        of = ", above the nearest minimum" if self.strain else ", unrelaxed"
        return f"minus the energy of the molecule by the force field MMFF94{of}"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Raises InputError if RDKit is not installed."""
        rdkit()
        value = float("nan") if self.failure_value is None else self.failure_value
        return OfMolecules(partial(energies, strain=self.strain), self.name, value, max_gradient_norm=self.max_gradient_norm)


def energies(molecules: Sequence[Molecule], strain: bool = False) -> Iterator[Computed | str]:
    """-E of each, with its gradient; with `strain`, E above the nearest minimum."""
    from rdkit.Chem import rdForceFieldHelpers as fields

    for molecule in molecules:
        found = bonded(molecule)
        parameters = None if found is None else fields.MMFFGetMoleculeProperties(found)
        if parameters is None:
            yield "no structure" if found is None else "no parameters"
            continue
        field = fields.MMFFGetMoleculeForceField(found, parameters)
        slope = np.array(field.CalcGrad()).reshape(-1, 3)
        energy = field.CalcEnergy()
        if strain:
            field.Minimize(maxIts=MOST_STEPS)
            energy -= field.CalcEnergy()
        yield Computed(-energy, -slope) if np.isfinite(slope).all() and np.isfinite(energy) else "numbers that are not finite"
