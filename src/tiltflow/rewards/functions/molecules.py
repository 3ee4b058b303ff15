"""Rewards of molecules: numbers that other libraries compute, with their gradients; failures are counted and have a value."""

# Mutation tests: test_rewards_of_molecules.py

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiltflow import processes
from tiltflow.chemistry.atoms import DIM, TYPE, Molecule, molecules_of, present
from tiltflow.chemistry.bonds import bonded
from tiltflow.chemistry.workers import Crashed, Workers
from tiltflow.chemistry.xtb import Answer, Hamiltonian, Question, require_tblite, single_point
from tiltflow.errors import InputError
from tiltflow.rewards.functions.failures import count_failures

ENOUGH = 8
"""So many molecules that all fail are an error: the model, not one of its samples, is unfit."""


@dataclass(frozen=True)
class Computed:
    """A number of one molecule.

    Args:
        gradient: of the value in the positions, per Å [n, 3]; None where there is none.
    """

    value: float
    gradient: NDArray[np.float64] | None = None


Compute = Callable[[Sequence[Molecule]], Iterator[Computed | str]]
"""The numbers of molecules, or why there is none, in words."""


@dataclass(frozen=True)
class OfMolecules:
    """A reward of samples [batch, atoms, 3 + 5] by what is computed of their molecules.

    Args:
        compute: gives the numbers, in the order of the molecules.
        name: of the reward, for errors.
        failure_value: of molecules that have no number; their gradient is zero.
        of_types: slope in the types of each atom [5]: that of a linear continuation from the corner of the simplex at which a
            molecule is computed. None for no slope.
        max_gradient_norm: longer gradients in the positions of a molecule are scaled down to it.
    """

    compute: Compute
    name: str
    failure_value: float
    of_types: tuple[float, ...] | None = None
    max_gradient_norm: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        molecules = molecules_of(x)
        with torch.no_grad():
            found = list(self.compute(molecules))
        failed = Counter(each for each in found if isinstance(each, str))
        count_failures(failed.total())
        if failed.total() == len(x) >= ENOUGH:
            reason, _ = failed.most_common(1)[0]
            raise InputError(f"reward {self.name}: fails for all of {len(x)} molecules ({reason})")
        values = x.new_tensor([self.failure_value if isinstance(each, str) else each.value for each in found])
        if not x.requires_grad or any(isinstance(each, Computed) and each.gradient is None for each in found):
            return values
        rows, gradient = present(x), torch.zeros_like(x)
        for i, each in enumerate(found):
            if isinstance(each, Computed) and each.gradient is not None:
                gradient[i, rows[i], :DIM] = torch.from_numpy(self._limited(each.gradient)).to(x)
                if self.of_types is not None:
                    slope = x.new_tensor(self.of_types)
                    # less its mean: types that add up to one stay so, and only their differences count
                    gradient[i, rows[i], DIM:] = (slope - slope.mean()) / TYPE
        joined: Tensor = _Given.apply(x, values, gradient)  # type: ignore[no-untyped-call]
        return joined

    def _limited(self, gradient: NDArray[np.float64]) -> NDArray[np.float64]:
        norm = float(np.linalg.norm(gradient))
        limit = self.max_gradient_norm
        return gradient if limit is None or norm <= limit else gradient * (limit / norm)


class _Given(torch.autograd.Function):
    """Values [batch] of x, whose gradient [batch, *event] is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return above[:, None, None] * gradient, None, None


def by_xtb(
    read: Callable[[Answer], Computed], method: Hamiltonian, max_iterations: int, num_workers: int | None = None
) -> Compute:
    """A number that is read from the answer of xTB. Raises InputError if tblite is not installed.

    Args:
        num_workers: processes that compute; None for one to a core, shared among the processes of a run.
    """
    require_tblite()
    workers = Workers(num_workers or max(1, (os.cpu_count() or 1) // processes.count()))

    def compute(molecules: Sequence[Molecule]) -> Iterator[Computed | str]:
        asked = [Question(each.numbers, each.positions, method, max_iterations) for each in molecules]
        for found in workers.map(single_point, asked):
            yield "a crash" if isinstance(found, Crashed) else found if isinstance(found, str) else read(found)

    return compute


def of_structure(score: Callable[[Any], float]) -> Compute:
    """A number of the structure that `bonded` finds, of one part: score(RDKit molecule without hydrogens)."""

    def compute(molecules: Sequence[Molecule]) -> Iterator[Computed | str]:
        for molecule in molecules:
            found = connected(molecule)
            yield Computed(score(found)) if found is not None else "no structure of one part"

    return compute


def connected(molecule: Molecule) -> Any | None:
    """The structure that `bonded` finds, in RDKit and without its hydrogens; None if there is none or it has several parts."""
    from rdkit import Chem

    found = bonded(molecule)
    return Chem.RemoveHs(found) if found is not None and len(Chem.GetMolFrags(found)) == 1 else None
