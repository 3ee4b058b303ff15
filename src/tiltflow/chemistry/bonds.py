"""Bonds of a molecule from where its atoms are: what RDKit needs to say anything of its chemistry."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from tiltflow.chemistry.atoms import Molecule
from tiltflow.chemistry.embedding import rdkit

REACH = 1.22
"""Atoms are bound that are nearer than this times the sum of their covalent radii. At RDKit's own 1.3 atoms across strained
rings are taken to be bound, and at 1.15 bonds are lost that are stretched a little: `python benchmarks/molecules.py bonds`."""
MOST_STEPS = 2000
"""Steps of the search for bond orders: molecules of nine heavy atoms take a few, and a crowd of atoms could take for ever."""
KEPT = 4096
"""Molecules, the last ones, of which what was found is kept: an evaluation asks several times for the bonds of the same."""


def bonded(molecule: Molecule) -> Any | None:
    """The molecule in RDKit, sanitised: its atoms in the same order, their bonds and positions. It may be of several parts.

    None where there is no structure of closed shells without charges: an atom has too many neighbours or too few, no bond
    orders suit them all, there are no atoms, or positions are not finite. Groups that are written with charges,
    such as nitro, have none.

    Raises InputError if RDKit is not installed.
    """
    numbers, positions = molecule.numbers.astype(np.int64), molecule.positions.astype(np.float64)
    found = _found(numbers.tobytes(), positions.tobytes(), REACH)
    return None if found is None else rdkit().Mol(found)  # the caller may change it


@lru_cache(KEPT)
def _found(numbers: bytes, positions: bytes, reach: float) -> Any | None:
    """`bonded` of atomic numbers, int64, and positions, float64."""
    chem = rdkit()
    from rdkit.Chem import rdDetermineBonds

    molecule = Molecule(np.frombuffer(numbers, np.int64), np.frombuffer(positions, np.float64).reshape(-1, 3))
    if not len(molecule) or not np.isfinite(molecule.positions).all():
        return None
    try:
        mol = connected(molecule, reach)
        rdDetermineBonds.DetermineBondOrders(
            mol, charge=0, allowChargedFragments=False, embedChiral=False, maxIterations=MOST_STEPS
        )
        chem.SanitizeMol(mol)
    except (ValueError, RuntimeError):  # RDKit's own exceptions are ValueErrors
        return None
    chem.AssignStereochemistryFrom3D(mol)
    atoms = list(mol.GetAtoms())
    return mol if not any(atom.GetNumRadicalElectrons() or atom.GetFormalCharge() for atom in atoms) else None


def connected(molecule: Molecule, reach: float = REACH) -> Any:
    """The atoms in RDKit, with their positions, and single bonds between those that are near enough; none where positions are
    not finite."""
    chem = rdkit()
    from rdkit.Chem import rdDetermineBonds

    mol = chem.RWMol()
    for number in molecule.numbers.tolist():
        atom = chem.Atom(number)
        atom.SetNoImplicit(True)
        mol.AddAtom(atom)
    conformer = chem.Conformer(len(molecule))
    conformer.SetPositions(molecule.positions.astype(np.float64))
    mol.AddConformer(conformer)
    if np.isfinite(molecule.positions).all():
        rdDetermineBonds.DetermineConnectivity(mol, useVdw=True, covFactor=reach)
    return mol


def smiles_of(mol: Any, *, stereo: bool = False) -> str:
    """Canonical SMILES of a molecule of `bonded`, without its hydrogens: equal for equal molecules."""
    chem = rdkit()
    plain = chem.Mol(mol)
    if not stereo:
        chem.RemoveStereochemistry(plain)  # first: hydrogens at double bonds with a side stay otherwise
    return str(chem.MolToSmiles(chem.RemoveHs(plain)))
