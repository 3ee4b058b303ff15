"""Validity of molecules: what their bonds say of them, how many differ, which are new, and how their bonds' lengths compare.

Valid is what `bonds.bonded` finds bonds for: closed shells without charges, of one part or of several.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tiltflow.chemistry.atoms import Molecule
from tiltflow.chemistry.bonds import bonded, smiles_of
from tiltflow.chemistry.embedding import rdkit
from tiltflow.chemistry.relaxation import relaxed


@dataclass(frozen=True)
class Structure:
    """What the bonds of a molecule say of it.

    Args:
        formula: its composition.
        smiles: canonical, without stereochemistry, so that it names the constitution alone; empty if it is not valid.
    """

    formula: str
    smiles: str

    @property
    def valid(self) -> bool:
        """Whether the atoms are one or several molecules."""
        return bool(self.smiles)

    @property
    def connected(self) -> bool:
        """Whether they are one valid molecule."""
        return self.valid and "." not in self.smiles


def structure(molecule: Molecule) -> Structure:
    """The structure of a molecule, by RDKit. Raises InputError where RDKit is not installed."""
    bonds = bonded(molecule)
    return Structure(molecule.formula, "" if bonds is None else smiles_of(bonds))


def structures(molecules: Iterable[Molecule]) -> list[Structure]:
    """The structures of several molecules."""
    return [structure(molecule) for molecule in molecules]


def canonical_smiles(several: Iterable[str]) -> set[str]:
    """SMILES as those of a structure are written, to ask which structures are new; what RDKit cannot read is left out."""
    return {smiles_of(molecule) for molecule in map(rdkit().MolFromSmiles, several) if molecule is not None}


# ---- of many ----


@dataclass(frozen=True)
class Shares:
    """What samples of a model are, as a whole.

    Args:
        valid: share of all samples.
        connected: share of all samples that are one valid molecule.
        unique: number of different molecules over that of connected samples; it falls as there are more of these.
        novel: share of the different molecules that are not known; None where no molecules are known.
    """

    valid: float
    connected: float
    unique: float
    novel: float | None


def shares(several: Sequence[Structure], known: Collection[str] | None = None) -> Shares:
    """The shares of structures that are valid, connected, unique and novel.

    Args:
        known: canonical SMILES (`canonical_smiles`), such as those that a model was trained on.
    """
    smiles = [each.smiles for each in several if each.connected]
    different = set(smiles)
    return Shares(
        valid=sum(each.valid for each in several) / max(1, len(several)),
        connected=len(smiles) / max(1, len(several)),
        unique=len(different) / max(1, len(smiles)),
        novel=None if known is None else len(different - set(known)) / max(1, len(different)),
    )


def composition(molecules: Iterable[Molecule]) -> Counter[str]:
    """How many molecules have each formula."""
    return Counter(molecule.formula for molecule in molecules)


# ---- bond lengths ----


Lengths = Mapping[str, NDArray[np.float64]]
"""In Å, by kind of bond, such as C-H, C=O, C#N and C:C (aromatic)."""


def bond_lengths(molecules: Sequence[Molecule], placed: Sequence[Molecule] | None = None) -> Lengths:
    """The lengths of the bonds of the molecules that are valid.

    Args:
        placed: the same atoms at other positions, between which lengths are taken; the bonds remain those of `molecules`.
    """
    found = defaultdict(list)
    for molecule, other in zip(molecules, placed or molecules, strict=True):
        bonds = bonded(molecule)
        for bond in () if bonds is None else bonds.GetBonds():
            ends = other.positions[[bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()]]
            first, last = sorted([bond.GetBeginAtom().GetSymbol(), bond.GetEndAtom().GetSymbol()])
            found[first + _ORDERS[bond.GetBondTypeAsDouble()] + last].append(np.linalg.norm(ends[1] - ends[0]))
    return {kind: np.array(found[kind]) for kind in sorted(found)}


def beyond_minima(molecules: Iterable[Molecule]) -> Lengths:
    """By how much bonds are longer than in the nearest minimum of MMFF94 of the same molecule, with their signs: unlike the
    mean length, that does not depend on which molecules they are of. Those that the force field does not know are left out."""
    found = [(molecule, each.molecule) for molecule in molecules if (each := relaxed(molecule)) is not None]
    ours, minima = [molecule for molecule, _ in found], [minimum for _, minimum in found]
    lengths, there = bond_lengths(ours), bond_lengths(ours, minima)
    return {kind: lengths[kind] - there[kind] for kind in lengths}


_ORDERS = {1.0: "-", 1.5: ":", 2.0: "=", 3.0: "#"}


@dataclass(frozen=True)
class BondLength:
    """The length of bonds of one kind, in Å: mean and standard deviation of samples, and of a reference."""

    kind: str
    count: int
    mean: float
    spread: float
    reference_mean: float
    reference_spread: float

    @property
    def error(self) -> float:
        """By how much the mean is too long (positive) or too short, in Å."""
        return self.mean - self.reference_mean


def bond_length_errors(lengths: Lengths, reference: Lengths, fewest: int = 20) -> list[BondLength]:
    """Compare lengths of bonds with those of a reference, for kinds of which both have `fewest`, the most common first."""
    kinds = [kind for kind in lengths if min(len(lengths[kind]), len(reference.get(kind, ()))) >= fewest]
    return [
        BondLength(
            kind,
            len(lengths[kind]),
            float(lengths[kind].mean()),
            float(lengths[kind].std()),
            float(reference[kind].mean()),
            float(reference[kind].std()),
        )
        for kind in sorted(kinds, key=lambda kind: -len(lengths[kind]))
    ]
