"""Bonds from geometries: small molecules by hand, strained rings from their SMILES, and what has no structure."""

from __future__ import annotations

import numpy as np
import pytest

from tiltflow.chemistry import bonds
from tiltflow.chemistry.atoms import Molecule
from tiltflow.chemistry.bonds import bonded, smiles_of
from tiltflow.chemistry.embedding import Question, embedded, rdkit

pytest.importorskip("rdkit", reason="the extra molecules is not installed")

WATER = [(8, 0.0, 0.0, 0.0), (1, 0.96, 0.0, 0.0), (1, -0.24, 0.93, 0.0)]
FORMALDEHYDE = [(8, 0.0, 0.0, 1.21), (6, 0.0, 0.0, 0.0), (1, 0.0, 0.94, -0.59), (1, 0.0, -0.94, -0.59)]
CYANIDE = [(1, 0.0, 0.0, -1.06), (6, 0.0, 0.0, 0.0), (7, 0.0, 0.0, 1.16)]


def molecule(rows: list[tuple[int, float, float, float]]) -> Molecule:
    return Molecule(np.array([row[0] for row in rows], dtype=np.int64), np.array([row[1:] for row in rows]).reshape(-1, 3))


def moved(rows: list[tuple[int, float, float, float]], by: float) -> list[tuple[int, float, float, float]]:
    return [(number, x + by, y, z) for number, x, y, z in rows]


@pytest.mark.parametrize(
    ("rows", "smiles"),
    [
        (WATER, "O"),
        (FORMALDEHYDE, "C=O"),
        (CYANIDE, "C#N"),
        ([(1, 0.0, 0.0, 0.0), (1, 0.74, 0.0, 0.0)], "[H][H]"),
        (WATER + moved(CYANIDE, 5.0), "C#N.O"),
    ],
)
def test_small_molecules(rows: list[tuple[int, float, float, float]], smiles: str) -> None:
    """The same whichever order the atoms have, and the atoms keep it."""
    for order in (rows, rows[::-1]):
        found = bonded(molecule(order))
        assert found is not None
        assert smiles_of(found) == smiles
        assert [atom.GetAtomicNum() for atom in found.GetAtoms()] == [row[0] for row in order]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        WATER[:2],  # a radical
        [(6, 0.0, 0.0, 0.0)],
        [(number, 0.0, 0.0, 0.0) for number, *_ in WATER],  # all in one place
        [(number, float("nan"), y, z) for number, _, y, z in WATER],
        [(1, 1.0, 0.0, 0.0), (1, -1.0, 0.0, 0.0), (1, 0.0, 1.0, 0.0), (8, 0.0, 0.0, 0.0)],  # three hydrogens on oxygen
    ],
)
def test_no_structure(rows: list[tuple[int, float, float, float]]) -> None:
    assert bonded(molecule(rows)) is None


@pytest.mark.parametrize(
    "smiles", ["C1CC2CC1O2", "CCC1C2CC1O2", "C1OC2C3OC2C13", "C1=CC=CC=C1O", "N=CO", "CC(=O)NC#C", "C[C@H](O)F"]
)
def test_the_bonds_of_a_geometry_are_those_of_its_smiles(smiles: str) -> None:
    """In strained rings too, where atoms that are not bound are near each other."""
    answer = embedded(Question(smiles, 1, 0))
    assert not isinstance(answer, str)
    found, chem = bonded(Molecule(answer[0].astype(np.int64), answer[1][0].astype(np.float64))), rdkit()
    meant = chem.MolFromSmiles(smiles)
    assert smiles_of(found) == smiles_of(meant)
    assert "@" not in smiles or smiles_of(found, stereo=True) == smiles_of(meant, stereo=True)


def test_bonds_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same atoms in the same places; each answer is the caller's own, and nothing is kept of another reach."""
    from rdkit.Chem import rdDetermineBonds

    looked, find = [], rdDetermineBonds.DetermineConnectivity
    monkeypatch.setattr(rdDetermineBonds, "DetermineConnectivity", lambda *some, **named: looked.append(find(*some, **named)))
    water, further = molecule(moved(WATER, 0.25)), molecule(moved(WATER, 0.5))
    first = bonded(water)
    assert first is not None
    first.RemoveConformer(0)
    again = bonded(molecule(moved(WATER, 0.25)))
    assert again is not None
    assert np.array_equal(again.GetConformer().GetPositions(), water.positions)
    assert len(looked) == 1
    bonded(further)
    assert len(looked) == 2
    monkeypatch.setattr(bonds, "REACH", 0.5)
    assert bonded(water) is None
    assert len(looked) == 3
