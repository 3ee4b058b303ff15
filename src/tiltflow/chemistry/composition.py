"""What a molecule is asked to be: its number of atoms, as in "19 atoms", or its composition, as in "C7H10O2"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tiltflow.chemistry.atoms import ELEMENTS
from tiltflow.errors import InputError


@dataclass(frozen=True)
class Asked:
    """The atoms that a molecule has.

    Args:
        atoms: how many.
        elements: of each, as an index of ELEMENTS, in the order of the rows of a state; None if they are free.
    """

    atoms: int
    elements: tuple[int, ...] | None = None


def asked_of(text: str) -> Asked:
    """Read what is asked for. Raises InputError for a text that is neither a number of atoms nor a composition of ELEMENTS.

    >>> asked_of("19 atoms"), asked_of("CH3F")
    (Asked(atoms=19, elements=None), Asked(atoms=5, elements=(1, 0, 0, 0, 4)))
    """
    if count := re.fullmatch(r"([1-9]\d{0,3}) atoms?", text):
        return Asked(int(count[1]))
    parts = re.findall(r"([A-Z][a-z]?)([1-9]\d{0,2})?", text)
    if not parts or "".join(symbol + count for symbol, count in parts) != text:
        raise InputError(f"{text!r} is neither a number of atoms, as in '19 atoms', nor a composition, as in 'C7H10O2'")
    for symbol, _ in parts:
        if symbol not in ELEMENTS:
            raise InputError(f"{text!r}: has {symbol}; molecules here have {', '.join(ELEMENTS)}")
    elements = tuple(ELEMENTS.index(symbol) for symbol, count in parts for _ in range(int(count or 1)))
    return Asked(len(elements), elements)


def size_name(atoms: int) -> str:
    """The text that asks for a number of atoms.

    >>> size_name(1), size_name(19)
    ('1 atom', '19 atoms')
    """
    return f"{atoms} atom{'' if atoms == 1 else 's'}"
