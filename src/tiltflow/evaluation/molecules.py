"""Samples that are molecules: how they are told from other samples, and what of them is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiltflow.chemistry.atoms import DIM, ELEMENTS, molecules_of
from tiltflow.chemistry.bonds import bonded
from tiltflow.chemistry.embedding import rdkit
from tiltflow.chemistry.validity import structures

CENTRED = 0.05
"""How far from zero, in Å, the sum of the positions of a molecule may be."""
RADIUS, BITS = 2, 512
"""Of Morgan fingerprints: bonds around an atom that are looked at, and numbers."""


def is_molecule(shape: Sequence[int]) -> bool:
    """Return whether a sample of this shape can be a molecule: [atoms, 3 + 5].

    >>> is_molecule((23, 8)), is_molecule((3, 8, 8))
    (True, False)
    """
    return len(shape) == 2 and shape[1] == DIM + len(ELEMENTS)


def are_molecules(x: Tensor) -> bool:
    """Return whether samples [n, *event] are molecules: of that shape, and each with its centre at zero.

    >>> are_molecules(torch.zeros(5, 23, 8)), are_molecules(torch.ones(5, 23, 8))
    (True, False)
    """
    return is_molecule(x.shape[1:]) and bool((x[..., :DIM].sum(1).abs() < CENTRED).all())


def connected(x: Tensor) -> Tensor:
    """Return 1 for each of the samples [n, atoms, 3 + 5] that is one valid molecule, 0 for others. Raises InputError if RDKit
    is not installed."""
    return torch.tensor([float(each.connected) for each in structures(molecules_of(x))])


def fingerprints(x: Tensor) -> Tensor:
    """Return the Morgan fingerprints [n, 512] of samples [n, atoms, 3 + 5], 0 and 1: which surroundings atoms have in their
    bonds, whatever their order and place; zeros where a molecule is not valid. Raises InputError if RDKit is not installed."""
    chem = rdkit()
    from rdkit.Chem import rdFingerprintGenerator

    make: Any = rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    bonds = [bonded(molecule) for molecule in molecules_of(x)]
    rows = [np.zeros(BITS) if one is None else make.GetFingerprintAsNumPy(chem.RemoveHs(one)) for one in bonds]
    return torch.from_numpy(np.stack(rows)).double()


def plain(x: Tensor, *, clamped: bool) -> Tensor:
    """Return what is compared of samples [n, *event] where no features are asked for: themselves, of molecules fingerprints.

    Args:
        clamped: samples are pictures of about [-1, 1], of which nothing beyond is seen.
    """
    if are_molecules(x):
        return fingerprints(x)
    return x.clamp(-1, 1) if clamped else x


def evenly(count: int, most: int) -> list[int]:
    """Return up to `most` of `count` places, evenly spaced.

    >>> evenly(5, 9), evenly(9, 4)
    ([0, 1, 2, 3, 4], [0, 3, 6])
    """
    return list(range(0, count, max(1, math.ceil(count / most))))
