"""Energies, their gradients and dipoles by the tight-binding methods GFN1-xTB and GFN2-xTB, with the library tblite.

Run by processes of `workers.py`, so torch is not imported here. A molecule of nine heavy atoms takes some 20 ms of one core.
One with an odd number of electrons is computed too: tblite fills orbitals by fractions, at its electronic temperature.
"""

# Mutation tests: test_xtb.py

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tiltflow.errors import not_installed

BOHR = 0.529177210903
"""In Å (CODATA 2018)."""
DEBYE = 2.541746473
"""Debye in one e·bohr."""
Hamiltonian = Literal["gfn1", "gfn2"]


@dataclass(frozen=True)
class Question:
    """A neutral molecule, and how it is computed.

    Args:
        numbers: atomic numbers [n].
        positions: in Å [n, 3].
        max_iterations: after so many the charges have not converged, and the calculation has failed.
    """

    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    method: Hamiltonian = "gfn1"
    max_iterations: int = 100


@dataclass(frozen=True)
class Answer:
    """What was computed.

    Args:
        energy: in hartree.
        gradient: of the energy in the positions, in hartree/Å [n, 3].
        dipole: in debye [3].
    """

    energy: float
    gradient: NDArray[np.float64]
    dipole: NDArray[np.float64]


def require_tblite() -> None:
    """Raises InputError if tblite is not installed."""
    if importlib.util.find_spec("tblite") is None:
        raise not_installed("tblite", "molecules")


def single_point(question: Question) -> Answer | str:
    """The answer; or, in words, why there is none: no atoms, positions that are not finite, charges that do not converge, or an
    energy above that of no molecule at all, which only atoms have that lie over each other."""
    if not len(question.numbers):
        return "no atoms"
    if not np.isfinite(question.positions).all():
        return "positions that are not finite"
    from tblite.exceptions import TBLiteRuntimeError, TBLiteValueError
    from tblite.interface import Calculator

    try:
        calculator = Calculator(f"{question.method.upper()}-xTB", question.numbers, question.positions / BOHR)
        calculator.set("verbosity", 0)
        calculator.set("max-iter", question.max_iterations)
        found = calculator.singlepoint()
        energy, gradient, dipole = float(found["energy"]), found["gradient"] / BOHR, found["dipole"] * DEBYE
    except (TBLiteRuntimeError, TBLiteValueError) as error:
        return str(error).strip() or "an error without words"
    if not (np.isfinite(energy) and np.isfinite(gradient).all() and np.isfinite(dipole).all()):
        return "numbers that are not finite"
    return Answer(energy, gradient, dipole) if energy <= 0 else "an energy above 0"
