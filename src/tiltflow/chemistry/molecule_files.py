"""Files of molecules that other programs read: .xyz, of atoms and positions, and .sdf, with bonds too."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tiltflow.chemistry.atoms import ELEMENTS, NUMBERS, Molecule
from tiltflow.chemistry.bonds import bonded, connected
from tiltflow.chemistry.embedding import rdkit

SYMBOLS = dict(zip(NUMBERS, ELEMENTS, strict=True))
REWARD = re.compile(r"(?<!\S)reward=(\S+)")


def to_xyz(molecules: Sequence[Molecule], rewards: Sequence[float] | None = None) -> str:
    """Several molecules as an .xyz file: of each the number of atoms, a comment (formula and reward), and a line for each atom
    with its element and its position in Å."""
    lines = []
    for i, molecule in enumerate(molecules):
        of_reward = "" if rewards is None else f" reward={rewards[i]:.6g}"
        lines += [str(len(molecule)), f"formula={molecule.formula}{of_reward}"]
        for number, at in zip(molecule.numbers.tolist(), molecule.positions.tolist(), strict=True):
            lines.append(f"{SYMBOLS[number]} {' '.join(f'{each:.5f}' for each in at)}")
    return "".join(f"{line}\n" for line in lines)


def from_xyz(text: str) -> list[tuple[Molecule, float | None]]:
    """The molecules of an .xyz file of `to_xyz`, each with its reward. Raises ValueError for another text."""
    lines, found, at = text.splitlines(), list[tuple[Molecule, float | None]](), 0
    numbers = {symbol: number for number, symbol in SYMBOLS.items()}
    while at < len(lines):
        count, reward = int(lines[at]), REWARD.search(lines[at + 1])
        rows = [line.split() for line in lines[at + 2 : at + 2 + count]]
        if len(rows) < count or not {row[0] for row in rows} <= numbers.keys():
            raise ValueError(f"no molecule of {count} atoms at line {at + 1}")
        positions = np.array([[float(each) for each in row[1:]] for row in rows]).reshape(count, 3)
        molecule = Molecule(np.array([numbers[row[0]] for row in rows], np.int64), positions)
        found.append((molecule, None if reward is None else float(reward[1])))
        at += 2 + count
    return found


def to_sdf(molecules: Sequence[Molecule]) -> str:
    """Several molecules as an .sdf file, whose property `valid` says of each whether it is a molecule: 1 with its bonds, or 0
    with a single bond wherever two atoms are near enough for one, as no orders suit them.

    Raises InputError if RDKit is not installed.
    """
    blocks = []
    for molecule in molecules:
        bonds = bonded(molecule)
        whole = connected(molecule) if bonds is None else bonds
        whole.SetProp("_Name", molecule.formula)
        block = rdkit().MolToMolBlock(whole, kekulize=bonds is not None)
        blocks.append(f"{block}>  <valid>\n{int(bonds is not None)}\n\n$$$$\n")
    return "".join(blocks)
