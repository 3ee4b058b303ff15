"""Molecules as tensors and back: positions and one-hot types of atoms, with rows of zeros where a molecule has no more atoms.

A sample is [atoms, 3 + 5]: positions in Å with the centre of mass (of atoms of equal weight) at zero, then the types, each with
TYPE where it is the atom's and 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tiltflow.errors import InputError

ELEMENTS = ("H", "C", "N", "O", "F")
"""The elements, in the order of their channels."""
NUMBERS = (1, 6, 7, 8, 9)
"""Their atomic numbers."""
VALENCES = (1, 4, 3, 2, 1)
"""How many bonds each has, in closed shells without charges."""
DIM = 3
"""Channels of positions, before those of types."""
TYPE = 0.25
"""What stands for the type of an atom: low beside the noise, so that a model draws first where atoms are, and then which they
are, for which these places leave little choice (2203.17003, section 3.3)."""
PRESENT = TYPE / 2
"""A row is an atom where its types add up to more."""


@dataclass(frozen=True, eq=False)
class Molecule:
    """A neutral molecule: its atoms, without bonds.

    Args:
        numbers: atomic numbers [n].
        positions: in Å [n, 3].
    """

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def formula(self) -> str:
        """Its composition in Hill's order: carbon and hydrogen first, the others by the alphabet.

        >>> water = Molecule(np.array([8, 1, 1]), np.zeros((3, 3)))
        >>> water.formula, Molecule(np.array([1, 6, 9, 8, 7, 6]), np.zeros((6, 3))).formula
        ('H2O', 'C2HFNO')
        """
        counts = {symbol: int((self.numbers == number).sum()) for symbol, number in zip(ELEMENTS, NUMBERS, strict=True)}
        first = ["C", "H"] if counts["C"] else []
        order = first + sorted(set(ELEMENTS) - set(first))
        return "".join(f"{symbol}{counts[symbol] if counts[symbol] > 1 else ''}" for symbol in order if counts[symbol])


def present(samples: Tensor) -> Tensor:
    """Which rows of samples [.., atoms, 3 + 5] are atoms: bool [.., atoms]."""
    return samples[..., DIM:].sum(-1) > PRESENT


def molecules_of(samples: Tensor) -> list[Molecule]:
    """The molecules of samples [batch, atoms, 3 + 5]: the element of an atom is its largest type. One without atoms is empty.

    Raises InputError for another shape.
    """
    if samples.ndim != 3 or samples.shape[2] != DIM + len(ELEMENTS):
        raise InputError(
            f"a molecule is a sample [atoms, {DIM + len(ELEMENTS)}]: positions, then one-hot types of {', '.join(ELEMENTS)}; "
            f"got samples of shape {list(samples.shape[1:])}"
        )
    samples = samples.detach().double().cpu()
    numbers = torch.tensor(NUMBERS)[samples[..., DIM:].argmax(-1)].numpy()
    positions = samples[..., :DIM].numpy()
    return [Molecule(numbers[i, rows], positions[i, rows]) for i, rows in enumerate(present(samples).numpy())]


def samples_of(molecules: Sequence[Molecule], atoms: int) -> Tensor:
    """Samples [len(molecules), atoms, 3 + 5], float32, whose atoms are those of the molecules in their order, each centred.

    Raises InputError for molecules with more atoms, or with other elements than ELEMENTS.
    """
    samples = torch.zeros(len(molecules), atoms, DIM + len(ELEMENTS))
    for i, molecule in enumerate(molecules):
        n = len(molecule)
        if n > atoms:
            raise InputError(f"molecule {i}, {molecule.formula}, has {n} atoms, and samples have room for {atoms}")
        if strange := sorted(set(molecule.numbers.tolist()) - set(NUMBERS)):
            raise InputError(f"molecule {i} has an atom of number {strange[0]}; known: {', '.join(ELEMENTS)}")
        if n:
            samples[i, :n, :DIM] = torch.from_numpy(molecule.positions - molecule.positions.mean(0))
            samples[i, torch.arange(n), DIM + torch.tensor([NUMBERS.index(number) for number in molecule.numbers.tolist()])] = (
                TYPE
            )
    return samples
