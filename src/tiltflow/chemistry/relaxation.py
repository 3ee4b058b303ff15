"""Relaxation of molecules in the force field MMFF94: how far a geometry is from one that a force field would have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tiltflow.chemistry.atoms import Molecule
from tiltflow.chemistry.bonds import bonded

MOST_STEPS = 2000


@dataclass(frozen=True, eq=False)
class Relaxed:
    """A molecule in the nearest minimum of the force field.

    Args:
        molecule: with its atoms in their order, and moved onto the one before.
        drop: energy that relaxing set free, in kcal/mol, 0 or more.
        rmsd: root mean square distance of the atoms before and after, in Å, where the two lie on each other best.
    """

    molecule: Molecule
    drop: float
    rmsd: float


def relaxed(molecule: Molecule) -> Relaxed | None:
    """Relax a molecule; None if it is not valid, or the force field does not know its atoms.

    Raises InputError if RDKit is not installed.
    """
    bonds = bonded(molecule)
    if bonds is None:
        return None
    from rdkit.Chem import AllChem

    chem: Any = AllChem
    properties = chem.MMFFGetMoleculeProperties(bonds)
    if properties is None:
        return None
    field = chem.MMFFGetMoleculeForceField(bonds, properties)
    before = field.CalcEnergy()
    field.Minimize(maxIts=MOST_STEPS)
    after = bonds.GetConformer().GetPositions()
    moved = onto(after, molecule.positions)
    rmsd = float(np.sqrt(np.square(moved - molecule.positions).sum(1).mean()))
    return Relaxed(Molecule(molecule.numbers, moved), before - field.CalcEnergy(), rmsd)


def onto(positions: Any, fixed: Any) -> Any:
    """Turn and shift positions [n, 3] so that their distance to others [n, 3] is least (Kabsch 1976)."""
    centre = fixed.mean(0)
    x, y = positions - positions.mean(0), fixed - centre
    u, _, v = np.linalg.svd(x.T @ y)
    u[:, -1] *= np.sign(np.linalg.det(u @ v))  # a rotation, no reflection
    return x @ u @ v + centre
