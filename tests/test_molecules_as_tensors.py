"""Molecules as tensors: the way there and back, and what is no molecule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tiltflow.chemistry.atoms import ELEMENTS, NUMBERS, Molecule, molecules_of, samples_of
from tiltflow.errors import InputError

WATER = Molecule(np.array([8, 1, 1]), np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]]))
FLUORINE = Molecule(np.array([9, 9]), np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 2.4]]))
NOTHING = Molecule(np.zeros(0, dtype=np.int64), np.zeros((0, 3)))


def test_there_and_back() -> None:
    """The same atoms in the same order and, up to the centre, in the same places."""
    molecules = [WATER, FLUORINE, NOTHING]
    samples = samples_of(molecules, 5)
    assert samples.shape == (3, 5, 3 + len(ELEMENTS))
    assert samples[..., :3].sum(1).abs().amax() < 1e-6
    assert not samples[0, 3:].any()
    for before, after in zip(molecules, molecules_of(samples), strict=True):
        assert after.numbers.tolist() == before.numbers.tolist()
        np.testing.assert_allclose(after.positions, before.positions - before.positions.sum(0) / max(1, len(before)), atol=1e-6)


def test_types_need_not_be_quite_one_hot_and_atoms_may_stand_anywhere() -> None:
    samples = torch.zeros(1, 4, 8)
    samples[0, 1] = torch.tensor([1.0, 2.0, 3.0, 0.025, 0.05, 0.075, 0.1, -0.05])  # oxygen; they add up to .2
    samples[0, 3] = torch.tensor([0.0, 0.0, 0.0, 0.12, 0.0, 0.0, 0.0, 0.0])  # nothing
    (molecule,) = molecules_of(samples)
    assert molecule.numbers.tolist() == [8]
    assert molecule.positions.tolist() == [[1.0, 2.0, 3.0]]


def test_numbers_are_those_of_the_elements() -> None:
    samples = torch.zeros(1, 5, 8)
    samples[0, :, 3:] = torch.eye(5)
    (molecule,) = molecules_of(samples)
    assert molecule.numbers.tolist() == list(NUMBERS)
    assert molecule.formula == "CHFNO"


def test_what_is_no_molecule_is_one_line() -> None:
    with pytest.raises(InputError, match=r"a sample \[atoms, 8\].*got samples of shape \[1, 28, 28\]"):
        molecules_of(torch.zeros(2, 1, 28, 28))
    with pytest.raises(InputError, match="molecule 1, H2O, has 3 atoms, and samples have room for 2"):
        samples_of([FLUORINE, WATER], 2)
    with pytest.raises(InputError, match="molecule 0 has an atom of number 16; known: H, C, N, O, F"):
        samples_of([Molecule(np.array([16]), np.zeros((1, 3)))], 2)
