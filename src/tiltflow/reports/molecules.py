"""Molecules for a reader: drawings of their bonds, and their atoms in space, which `molecules.js` turns."""

# Mutation tests: none: pictures

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from PIL import Image

from tiltflow.chemistry.atoms import Molecule
from tiltflow.chemistry.bonds import bonded
from tiltflow.chemistry.embedding import rdkit
from tiltflow.chemistry.molecule_files import SYMBOLS, from_xyz
from tiltflow.evaluation.molecules import evenly
from tiltflow.formatting import decimal

DRAWING, BOND = (220, 130), 26
"""Width and height of a drawing, and length of a bond where there is room, in pixels."""
SHOWN = 24
"""Pairs of a report, at most."""
PALETTE = {-1: ("ink", "#26303c"), 7: ("N", "#2f6fd0"), 8: ("O", "#c2453d"), 9: ("F", "#2e8b57")}
"""By atomic number, -1 being all others, the CSS variable of the colour in a drawing, and its value if the page sets none."""


@dataclass(frozen=True)
class Shape:
    """A molecule before or after tuning.

    Args:
        side: "before" or "after".
        svg: drawing of its bonds; empty if it is not valid.
        formula: with its indices, as parts of text and numbers.
        note: its reward.
        atoms: symbols and positions, as `molecules.js` reads them.
    """

    side: str
    svg: str
    formula: Sequence[tuple[str, str]]
    note: str
    atoms: str

    @property
    def words(self) -> str:
        """The formula in plain text."""
        return "".join(symbol + count for symbol, count in self.formula)


def pairs_of(before: str, after: str) -> list[tuple[Shape, Shape]]:
    """Pair the molecules of two .xyz files, those before tuning and those from the same noise after it."""
    both = list(zip(from_xyz(before), from_xyz(after), strict=False))
    places = decimals([reward for pair in both for _, reward in pair if reward is not None])
    return [(shape("before", *both[i][0], places), shape("after", *both[i][1], places)) for i in evenly(len(both), SHOWN)]


def decimals(rewards: Sequence[float]) -> int | None:
    """Decimal places that tell rewards apart: two digits of their median distance from the median. None where they are alike.

    Energies of isomers differ in the fourth digit.
    """
    if not rewards:
        return None
    middle = statistics.median(rewards)
    spread = statistics.median(abs(reward - middle) for reward in rewards)
    return min(6, max(0, 1 - math.floor(math.log10(spread)))) if spread > 0 else None


def shape(side: str, molecule: Molecule, reward: float | None, places: int | None = None) -> Shape:
    """A molecule as the report shows it.

    Args:
        places: decimal places of the reward; None for three digits.
    """
    formula = re.findall(r"([A-Z][a-z]?)(\d*)", molecule.formula)
    rows = zip(molecule.numbers.tolist(), molecule.positions.tolist(), strict=True)
    atoms = ";".join(f"{SYMBOLS[number]} {' '.join(f'{each:.2f}' for each in at)}" for number, at in rows)
    return Shape(side, drawing(molecule), formula, note(reward, places), atoms)


def note(reward: float | None, places: int | None) -> str:
    """A reward below a molecule, in three digits or more; nothing where there is none."""
    if reward is None:
        return ""
    usual = decimal(reward)
    return usual if places is None else max(usual, f"{reward:.{places}f}".replace("-", "−"), key=len)


def drawing(molecule: Molecule) -> str:
    """Draw the bonds of a molecule as SVG in the colours of the page; empty if it is not valid."""
    flat = flattened(molecule)
    if flat is None:
        return ""
    from rdkit.Chem.Draw import rdMolDraw2D

    board = rdMolDraw2D.MolDraw2DSVG(*DRAWING)
    options: Any = board.drawOptions()
    options.clearBackground, options.fixedBondLength = False, BOND
    options.setAtomPalette({number: _channels(colour) for number, (_, colour) in PALETTE.items()})
    rdMolDraw2D.PrepareAndDrawMolecule(board, flat)
    board.FinishDrawing()
    text = board.GetDrawingText()
    text = re.sub(r"<!--.*?-->\s*", "", text[text.index("<svg") :])
    for name, colour in PALETTE.values():
        text = text.replace(colour.upper(), f"var(--{name}, {colour})")
    return str(text)


def molecule_grid(molecules: Sequence[Molecule], columns: int, notes: Sequence[str] = ()) -> Image.Image:
    """Arrange drawings of molecules in rows of `columns`, each above its formula; one that is not valid says so.

    Args:
        notes: a word on each, after its formula.
    """
    chem, flat = rdkit(), [flattened(molecule) for molecule in molecules]
    from rdkit.Chem import Draw

    nothing = chem.MolFromSmiles("*")
    nothing.GetAtomWithIdx(0).SetProp("atomLabel", "not valid")
    formulas = [molecule.formula for molecule in molecules]
    legends = [", ".join(filter(None, (formula, note))) for formula, note in zip_longest(formulas, notes, fillvalue="")]
    drawn = [nothing if mol is None else mol for mol in flat]
    draw: Any = Draw.MolsToGridImage
    grid: Image.Image = draw(drawn, molsPerRow=columns, subImgSize=DRAWING, legends=legends)
    return grid


def flattened(molecule: Molecule) -> Any | None:
    """A molecule of RDKit in the plane, without hydrogens on carbon; None if it is not valid."""
    bonds = bonded(molecule)
    if bonds is None:
        return None
    from rdkit.Chem import rdDepictor

    flat = rdkit().RemoveHs(bonds)
    rdDepictor.Compute2DCoords(flat)
    return flat


def _channels(colour: str) -> tuple[float, ...]:
    """RDKit rounds down."""
    return tuple((int(colour[i : i + 2], 16) + 0.5) / 255 for i in (1, 3, 5))
