"""Molecules are valid where their bonds say so, and what is broken is told from what is whole."""

from __future__ import annotations

import numpy as np
import pytest

from tiltflow.chemistry.atoms import NUMBERS, Molecule
from tiltflow.chemistry.relaxation import relaxed
from tiltflow.chemistry.validity import (
    Shares,
    beyond_minima,
    bond_length_errors,
    bond_lengths,
    canonical_smiles,
    composition,
    shares,
    structure,
    structures,
)

pytest.importorskip("rdkit")

from rdkit import Chem
from rdkit.Chem import AllChem

WHOLE = ["CCO", "C1CC1C#N", "c1ccccc1O", "CC(N)=O", "O=C=O", "FC(F)F", "C1C2CC1C2", "N#N", "C=O"]


def molecule(smiles: str) -> Molecule:
    """Of RDKit's geometry, which is from SMILES and not from the code that is tested."""
    found = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(found, randomSeed=7) == 0
    AllChem.MMFFOptimizeMolecule(found)
    return Molecule(np.array([atom.GetAtomicNum() for atom in found.GetAtoms()]), found.GetConformer().GetPositions())


def without(one: Molecule, *which: int) -> Molecule:
    return Molecule(np.delete(one.numbers, which), np.delete(one.positions, which, 0))


def beside(one: Molecule, other: Molecule, apart: float = 8.0) -> Molecule:
    shifted = other.positions + np.array([apart, 0, 0])
    return Molecule(np.concatenate([one.numbers, other.numbers]), np.concatenate([one.positions, shifted]))


@pytest.mark.parametrize("smiles", WHOLE)
def test_a_molecule_is_found_in_the_positions_of_its_atoms(smiles: str) -> None:
    found = structure(molecule(smiles))
    assert found.valid
    assert found.connected
    assert {found.smiles} == canonical_smiles([smiles])


def test_stereochemistry_is_no_other_structure() -> None:
    left, right = (structure(molecule(smiles)).smiles for smiles in ("C[C@H](N)O", "C[C@@H](N)O"))
    assert left == right == "CC(N)O"
    assert structure(molecule("N=CO")).smiles == "N=CO"  # whose hydrogen has a side


@pytest.mark.parametrize("smiles", ["CCO", "C1CC1C#N", "c1ccccc1O", "CC(N)=O", "CC", "C"])
def test_without_a_hydrogen_it_is_not_valid(smiles: str) -> None:
    whole = molecule(smiles)
    for hydrogen in np.flatnonzero(whole.numbers == 1):
        assert not structure(without(whole, int(hydrogen))).valid


def test_two_hydrogens_fewer_are_valid_only_where_a_bond_can_take_their_place() -> None:
    """As butane's hydrogens are numbered, 4 to 6 are of the first carbon, 7 and 8 of the second."""
    butane = molecule("CCCC")
    assert not structure(without(butane, 4, 5)).valid, "a carbene"
    assert not structure(without(butane, 4, 13)).valid, "a cation far from an anion"
    assert structure(without(butane, 4, 7)).smiles == "C=CCC"


def test_broken_geometries_are_not_valid() -> None:
    ethanol = molecule("CCO")
    stretched = Molecule(ethanol.numbers, 2 * ethanol.positions)
    squeezed = Molecule(ethanol.numbers, 0.5 * ethanol.positions)
    single = [Molecule(np.array([number]), np.zeros((1, 3))) for number in NUMBERS]
    nothing = Molecule(np.zeros(0, np.int64), np.zeros((0, 3)))
    for each in (stretched, squeezed, nothing, *single):
        assert structure(each).smiles == ""
    assert structure(nothing).formula == ""


def test_charges_are_not_valid() -> None:
    """Neither a nitro group, which is written with them, nor carbon monoxide, nor an ion."""
    for smiles in ("C[N+](=O)[O-]", "[C-]#[O+]", "[NH4+]"):
        assert not structure(molecule(smiles)).valid


@pytest.mark.parametrize("smiles", ["C1C2CC1C2", "CC12CC(C1)C2O", "C1CC2CC1O2"])
def test_strained_rings_have_no_bond_across(smiles: str) -> None:
    assert structure(molecule(smiles)).smiles in canonical_smiles([smiles])


def test_a_little_noise_breaks_few_molecules() -> None:
    """Of the law of 1.25: the longest bonds may be stretched by a tenth of an Å."""
    generator, plain = np.random.default_rng(0), [molecule(smiles) for smiles in WHOLE for _ in range(20)]
    noisy = [Molecule(one.numbers, one.positions + 0.05 * generator.normal(size=one.positions.shape)) for one in plain]
    assert shares(structures(noisy)).connected > 0.95


def test_two_fragments_are_valid_and_not_connected() -> None:
    found = structure(beside(molecule("CCO"), molecule("C")))
    assert (found.valid, found.connected, found.smiles, found.formula) == (True, False, "C.CCO", "C3H10O")
    assert not structure(beside(molecule("CCO"), without(molecule("C"), 4))).valid


def test_atoms_in_another_order_and_place_are_the_same_molecule() -> None:
    one, generator = molecule("CC(N)=O"), np.random.default_rng(0)
    order, (rotation, _) = generator.permutation(len(one)), np.linalg.qr(generator.normal(size=(3, 3)))
    assert structure(Molecule(one.numbers[order], one.positions[order] @ rotation + 3)) == structure(one)


def test_shares_of_many() -> None:
    ethanol, methane = molecule("CCO"), molecule("C")
    many = [ethanol, ethanol, methane, molecule("CO"), without(methane, 4), beside(methane, ethanol)]
    found, formulas = structures(many), composition(many)
    assert shares(found, canonical_smiles(["OCC", "C", "not a molecule"])) == Shares(5 / 6, 4 / 6, 3 / 4, 1 / 3)
    assert shares(found).novel is None
    assert shares([]) == Shares(0, 0, 0, None)
    assert formulas == {"C2H6O": 2, "CH4": 1, "CH4O": 1, "CH3": 1, "C3H10O": 1}


def test_lengths_of_bonds_are_those_of_the_positions() -> None:
    """Of carbon dioxide and hydrogen cyanide in a line, at lengths that are known."""
    dioxide = Molecule(np.array([8, 6, 8]), np.array([[-1.16, 0, 0], [0, 0, 0], [1.2, 0, 0]]))
    cyanide = Molecule(np.array([1, 6, 7]), np.array([[0, 0, -1.07], [0, 0, 0], [0, 0, 1.15]]))
    found = bond_lengths([dioxide, cyanide, without(dioxide, 0, 2)])
    assert {kind: np.round(lengths, 6).tolist() for kind, lengths in found.items()} == {
        "C#N": [1.15], "C-H": [1.07], "C=O": [1.16, 1.2],
    }  # fmt: skip
    assert set(bond_lengths([molecule("c1ccccc1")])) == {"C-H", "C:C"}


def test_bonds_beyond_their_minima_do_not_depend_on_which_molecules_they_are_of() -> None:
    """A methyl group that is moved away along its bond is what is found, of two molecules in their minima."""
    ethane, methanol = (relaxed(molecule(smiles)) for smiles in ("CC", "CO"))
    assert ethane is not None
    assert methanol is not None
    longer = []
    for one in (ethane.molecule, methanol.molecule):
        line = one.positions[0] - one.positions[1]
        near = np.linalg.norm(one.positions - one.positions[0], axis=1) < 1.3  # the carbon and its hydrogens
        longer.append(Molecule(one.numbers, one.positions + np.outer(near, 0.02 * line / np.linalg.norm(line))))
    found = beyond_minima([*longer, without(ethane.molecule, 7)])
    assert set(found) == {"C-C", "C-H", "C-O", "H-O"}
    assert found["C-C"] == pytest.approx(0.02, abs=2e-4)
    assert found["C-O"] == pytest.approx(0.02, abs=2e-4)
    assert np.abs(np.concatenate([found["C-H"], found["H-O"]])).max() < 2e-4
    assert len(found["C-H"]) == 9


def test_errors_of_bond_lengths_are_against_the_reference() -> None:
    ours = {"C-C": np.array([1.5, 1.6]), "C-H": np.array([1.0, 1.1, 1.2]), "C#N": np.array([1.1]), "O-O": np.ones(9)}
    theirs = {"C-C": np.array([1.4, 1.5]), "C-H": np.array([1.1, 1.1]), "C#N": np.ones(9)}
    first, second = bond_length_errors(ours, theirs, fewest=2)
    assert (first.kind, first.count, second.kind, second.count) == ("C-H", 3, "C-C", 2)
    assert second.error == pytest.approx(0.1)
    assert second.spread == pytest.approx(0.05) == second.reference_spread
    assert first.error == pytest.approx(0)
    assert first.reference_spread == 0
