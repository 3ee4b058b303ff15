"""xTB against symmetry, experiment and finite differences; what fails, and in which order answers come."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltflow.chemistry.atoms import ELEMENTS, PRESENT, TYPE, Molecule, molecules_of, samples_of
from tiltflow.chemistry.xtb import Answer, Hamiltonian, Question, single_point
from tiltflow.errors import InputError
from tiltflow.plugins import find
from tiltflow.rewards.functions.checked import value_and_gradient
from tiltflow.rewards.functions.failures import Failures
from tiltflow.rewards.xtb_energy import SHARES
from tiltflow.settings import validate
from tiltflow.streams import stream
from tiltflow.testing import check_reward

installed = pytest.mark.skipif(importlib.util.find_spec("tblite") is None, reason="the extra molecules is not installed")

WATER = Molecule(np.array([8, 1, 1]), np.array([[0.0, 0.0, 0.1173], [0.0, 0.7572, -0.4692], [0.0, -0.7572, -0.4692]]))
CYANIDE = Molecule(np.array([1, 6, 7]), np.array([[0.0, 0.0, -1.066], [0.0, 0.0, 0.0], [0.0, 0.0, 1.153]]))
FLUORIDE = Molecule(np.array([1, 9]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.917]]))
CARBON_DIOXIDE = Molecule(np.array([8, 6, 8]), np.array([[0.0, 0.0, -1.16], [0.0, 0.0, 0.0], [0.0, 0.0, 1.16]]))
OVERLAID = Molecule(np.array([8, 1, 1]), np.zeros((3, 3)))
SAMPLES = [WATER, CYANIDE, FLUORIDE, CARBON_DIOXIDE]


def settings(name: str, **tree: Any) -> Any:
    return validate(find("rewards", name), {"name": name, "num_workers": 1, **tree}, "reward")


def answer(molecule: Molecule, method: Hamiltonian = "gfn1") -> Answer:
    found = single_point(Question(molecule.numbers, molecule.positions, method))
    assert isinstance(found, Answer), found
    return found


@pytest.fixture(scope="module")
def reward() -> Any:
    return settings("xtb-energy").build()


@pytest.fixture
def bent() -> Tensor:
    """Molecules that are not at rest, in float64 so that differences are fine."""
    x = samples_of(SAMPLES, 4).double()
    x[..., :3] += (
        0.05 * torch.randn(x[..., :3].shape, generator=stream(0), dtype=x.dtype) * (x[..., 3:].sum(-1, keepdim=True) / TYPE)
    )
    return x


@installed
@pytest.mark.parametrize("method", ["gfn1", "gfn2"])
def test_units_are_those_of_chemistry(method: Hamiltonian) -> None:
    """Experiments: the bond of hydrogen is 0.741 Å long, where the gradient changes its sign, and as stiff as 575 N/m, which is
    1.319 hartree/Å²; the dipole of hydrogen fluoride is 1.83 debye, along the bond, of carbon dioxide none."""
    hydrogen = [Molecule(np.array([1, 1]), np.array([[0.0, 0, 0], [0, 0, length]])) for length in (0.70, 0.80)]
    short, long = (answer(each, method).gradient[1, 2] for each in hydrogen)
    assert short < 0 < long
    assert (long - short) / 0.10 == pytest.approx(1.319, rel={"gfn1": 0.5, "gfn2": 0.25}[method])
    dipole = answer(FLUORIDE, method).dipole
    assert np.linalg.norm(dipole) == pytest.approx(1.83, abs=0.8)
    assert dipole[2] < 0  # from the negative fluorine to the positive hydrogen
    assert np.linalg.norm(answer(CARBON_DIOXIDE, method).dipole) < 1e-4


@installed
def test_the_gradient_is_that_of_finite_differences(reward: Any, bent: Tensor) -> None:
    value, gradient = value_and_gradient(reward, bent)
    assert value.tolist() == pytest.approx([-answer(each).energy for each in molecules_of(bent)])
    step, way = 1e-4, torch.randn(bent[..., :3].shape, generator=stream(1), dtype=bent.dtype)
    way *= bent[..., 3:].sum(-1, keepdim=True) / TYPE
    moved = torch.cat([way, torch.zeros_like(bent[..., 3:])], -1)
    slope = (reward(bent + step * moved) - reward(bent - step * moved)) / (2 * step)
    torch.testing.assert_close((gradient * moved).sum((1, 2)), slope, rtol=1e-4, atol=1e-5)
    assert gradient[..., :3].sum(1).abs().max() < 1e-5  # nothing is gained by moving the whole molecule


@installed
def test_the_gradient_in_the_types_is_what_elements_add(reward: Any, bent: Tensor) -> None:
    """Their differences, at atoms alone; and none where it is switched off."""
    gradient = value_and_gradient(reward, bent)[1][..., 3:]
    atoms = bent[..., 3:].sum(-1) > PRESENT
    assert not gradient[~atoms].any()
    for a, b in ((0, 1), (2, 4)):
        assert (gradient[atoms][:, a] - gradient[atoms][:, b]).tolist() == pytest.approx(
            [(SHARES["gfn1"][a] - SHARES["gfn1"][b]) / TYPE] * int(atoms.sum())
        )
    assert gradient.sum(-1).abs().max() < 1e-6
    assert not value_and_gradient(settings("xtb-energy", type_gradient=False).build(), bent)[1][..., 3:].any()


@installed
@pytest.mark.parametrize("method", ["gfn1", "gfn2"])
def test_the_slope_in_the_types_is_the_change_to_another_element(method: Hamiltonian) -> None:
    """To 0.3 hartree of some 1.1, as the continuation is a fit to whole molecules: an atom is exchanged for its neighbour in
    the periodic table, all others stay where they are, and xTB computes both."""
    reward = settings("xtb-energy", method=method).build()
    for one, row, to in ((WATER, 0, 7), (CARBON_DIOXIDE, 1, 7), (FLUORIDE, 1, 8), (CYANIDE, 2, 6)):
        other = Molecule(np.where(np.arange(len(one)) == row, to, one.numbers), one.positions)
        before, after = samples_of([one], len(one)).double(), samples_of([other], len(one)).double()
        slope = value_and_gradient(reward, before)[1]
        change = (reward(after) - reward(before)).item()
        assert (slope * (after - before)).sum().item() == pytest.approx(change, abs=0.3)


@installed
def test_what_elements_add_is_the_energy_of_small_molecules_to_a_tenth() -> None:
    """The fit is to QM9; molecules that are not among those that it is to."""
    for method in ("gfn1", "gfn2"):
        shares = dict(zip((1, 6, 7, 8, 9), SHARES[method], strict=True))
        assert len(shares) == len(ELEMENTS)
        for molecule in (WATER, CYANIDE, CARBON_DIOXIDE):
            assert -answer(molecule, method).energy == pytest.approx(sum(shares[n] for n in molecule.numbers.tolist()), rel=0.1)


@installed
def test_failures_have_their_value_no_gradient_and_are_counted(reward: Any) -> None:
    x = samples_of([WATER, OVERLAID, FLUORIDE, Molecule(np.zeros(0, dtype=np.int64), np.zeros((0, 3)))], 3)
    with Failures() as failures:
        value, gradient = value_and_gradient(reward, x)
        assert failures.taken() == {"failed": 2.0}
        assert failures.taken() == {}
        with failures.paused():
            reward(x)
        assert failures.taken() == {}
    assert value[[1, 3]].tolist() == [0.0, 0.0]
    assert value[[0, 2]].tolist() == pytest.approx([-answer(each).energy for each in (WATER, FLUORIDE)], rel=1e-6)
    assert not gradient[[1, 3]].any()
    assert gradient[[0, 2]].flatten(1).any(1).all()
    unknown = settings("xtb-energy", failure_value=None).build()(x)
    assert [math.isnan(each) for each in unknown.tolist()] == [False, True, False, True]
    for nearer, why in (
        (0.2, "an energy above 0"),
        (0.0, "Too close interatomic distances found"),
        (np.nan, "positions that are not"),
    ):
        assert why in str(single_point(Question(WATER.numbers, nearer * WATER.positions)))
    assert "not converged" in str(single_point(Question(CYANIDE.numbers, CYANIDE.positions, max_iterations=1)))
    with pytest.raises(InputError, match=r"reward xtb-energy: fails for all of 8 molecules \(no atoms\)"):
        reward(torch.zeros(8, 3, 8))


@installed
def test_the_rewards_hold_what_all_rewards_must(bent: Tensor) -> None:
    """Without the slope in the types, along which the energy of the nearest elements does not change."""
    check_reward(settings("xtb-energy", type_gradient=False).build(), bent)
    check_reward(settings("dipole").build(), bent, gradient=False)


@installed
def test_long_gradients_are_scaled_down(bent: Tensor) -> None:
    """In the positions of each molecule, with their direction."""
    long, short = (
        value_and_gradient(settings("xtb-energy", max_gradient_norm=limit).build(), bent)[1][..., :3].flatten(1)
        for limit in (None, 0.1)
    )
    norms = long.norm(dim=1)
    assert (norms > 0.1).sum() > 1
    torch.testing.assert_close(short, long * (0.1 / norms).clamp(max=1)[:, None])


@installed
def test_answers_come_in_order_whatever_the_number_of_processes(bent: Tensor, reward: Any) -> None:
    many = torch.cat([bent] * 5)
    assert torch.equal(settings("xtb-energy", num_workers=3).build()(many), reward(many))


@installed
def test_the_dipole_is_a_reward() -> None:
    made = settings("dipole")
    assert not made.differentiable
    found = made.build()(samples_of([FLUORIDE, CARBON_DIOXIDE, OVERLAID], 3))
    assert found.tolist() == pytest.approx([np.linalg.norm(answer(FLUORIDE, "gfn2").dipole), 0.0, 0.0], abs=1e-4)
    assert not found.requires_grad


def test_without_tblite_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("xtb-energy", "dipole"):
        with pytest.raises(InputError, match=r"tblite is not installed: pip install '\.\[molecules\]'"):
            settings(name).build()
