"""Geometries of molecules from their SMILES, by distance geometry (ETKDGv3) and the force field MMFF94: not those of DFT.

Run by processes of `workers.py`, so torch is not imported here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tiltflow.errors import not_installed

MOST_STEPS = 5000
"""Steps of the minimisation; most molecules of nine heavy atoms take some hundred."""
Reason = Literal["charges", "radicals", "several parts", "no geometry", "no force field", "not minimised"]


@dataclass(frozen=True)
class Kind:
    """What SMILES say before there is a geometry.

    Args:
        counts: of atoms by element, hydrogens included.
        reason: why the molecule is left out; empty where it is not.
    """

    counts: dict[str, int]
    reason: Reason | Literal[""]

    @property
    def heavy_atoms(self) -> int:
        return sum(count for symbol, count in self.counts.items() if symbol != "H")


@dataclass(frozen=True)
class Question:
    """What is asked for: so many geometries, from random numbers that depend on the seed and the SMILES alone."""

    smiles: str
    conformers: int
    seed: int


def rdkit() -> Any:
    """RDKit's chemistry, which prints nothing from here on. Raises InputError if it is not installed."""
    try:
        from rdkit import Chem, RDLogger
    except ImportError:
        raise not_installed("rdkit", "molecules") from None
    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    return Chem


def kinds(smiles: list[str]) -> list[Kind | None]:
    """What each says; None where it does not parse."""
    return [_kind(each) for each in smiles]


def _kind(smiles: str) -> Kind | None:
    chem = rdkit()
    mol = chem.MolFromSmiles(smiles)
    if mol is None or not mol.GetNumAtoms():
        return None
    counts: dict[str, int] = {}
    for atom in mol.GetAtoms():
        counts[atom.GetSymbol()] = counts.get(atom.GetSymbol(), 0) + 1
        counts["H"] = counts.get("H", 0) + atom.GetTotalNumHs()
    charged = any(atom.GetFormalCharge() for atom in mol.GetAtoms())
    radical = any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms())
    reason: Reason | Literal[""] = "charges" if charged else "radicals" if radical else ""
    if not reason and len(chem.GetMolFrags(mol)) > 1:
        reason = "several parts"
    return Kind({symbol: count for symbol, count in counts.items() if count}, reason)


def embedded(question: Question) -> tuple[NDArray[np.int8], NDArray[np.float32]] | Reason:
    """(atomic numbers [atoms], centred positions in Å [up to conformers, atoms, 3]); or why there are none."""
    chem = rdkit()
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    mol = chem.AddHs(chem.MolFromSmiles(question.smiles))
    ways: Any = rdDistGeom.ETKDGv3()
    digest = hashlib.blake2b(f"{question.seed} {question.smiles}".encode(), digest_size=4).digest()
    ways.randomSeed = int.from_bytes(digest, "big") >> 1
    if not len(rdDistGeom.EmbedMultipleConfs(mol, question.conformers, ways)):
        return "no geometry"
    found = rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(mol, maxIters=MOST_STEPS)  # (0 where it converged, energy) of each
    if all(status < 0 for status, _ in found):
        return "no force field"
    kept = [each.GetPositions() for each, (status, _) in zip(mol.GetConformers(), found, strict=True) if status == 0]
    if not kept:
        return "not minimised"
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int8)
    return numbers, np.stack([each - each.mean(0) for each in kept]).astype(np.float32)
