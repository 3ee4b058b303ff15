"""Rewards of molecules by RDKit against known values, finite differences, and what has no structure."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tiltflow.chemistry.atoms import Molecule, molecules_of, present, samples_of
from tiltflow.chemistry.embedding import Question, embedded
from tiltflow.chemistry.relaxation import relaxed
from tiltflow.errors import InputError
from tiltflow.plugins import find
from tiltflow.rewards import LearnedReward, RewardSettings
from tiltflow.rewards.functions.checked import value_and_gradient
from tiltflow.rewards.functions.failures import Failures
from tiltflow.settings import validate
from tiltflow.streams import stream
from tiltflow.testing import check_reward
from tiltflow.utilities.estimation.known import Known
from tiltflow.utilities.log_barrier import LogBarrier

pytest.importorskip("rdkit", reason="the extra molecules is not installed")

NAMES = ["xtb-energy", "dipole", "mmff-energy", "qed", "logp", "sa-score", "validity"]
SMILES = ["CCO", "CC(=O)N", "c1ccccc1"]


def settings(name: str, **tree: Any) -> Any:
    return validate(find("rewards", name), {"name": name, **tree}, "reward")


@pytest.fixture(scope="module")
def molecules() -> list[Molecule]:
    """Ethanol, acetamide and benzene; two molecules of water; atoms that are none."""
    answers = [embedded(Question(smiles, 1, 0)) for smiles in SMILES]
    made = [Molecule(each[0].astype(np.int64), each[1][0].astype(np.float64)) for each in answers if not isinstance(each, str)]
    water = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    two = Molecule(np.array([8, 1, 1, 8, 1, 1]), np.concatenate([water, water + 4]))
    return [*made, two, Molecule(np.array([6, 8]), np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]]))]


@pytest.mark.parametrize("name", NAMES)
def test_conventions(name: str) -> None:
    made = settings(name)
    assert isinstance(made, RewardSettings)
    assert made.differentiable is (name in ("xtb-energy", "mmff-energy"))
    for text in (made.unit, made.description):
        assert text
        assert not text.endswith(".")
    assert type(made).model_validate(made.model_dump(mode="json")) == made
    assert not isinstance(made, LearnedReward)


@pytest.mark.parametrize(
    ("name", "expected", "failure"),
    [
        ("qed", [0.407, None, 0.443], 0.0),  # RDKit's of their SMILES
        ("logp", [-0.0014, None, 1.6866], -10.0),
        ("sa-score", [-1.98, None, -1.0], -10.0),
        ("validity", [1.0, 1.0, 1.0], 0.0),
    ],
)
def test_rewards_of_the_structure(name: str, expected: list[float | None], failure: float, molecules: list[Molecule]) -> None:
    """As RDKit has them of the SMILES; two molecules or loose atoms fail, and are counted."""
    from rdkit import Chem
    from rdkit.Chem import QED, Crippen
    from rdkit.Contrib.SA_Score import sascorer

    of_smiles = {
        "qed": QED.qed,
        "logp": Crippen.MolLogP,
        "sa-score": lambda m: -sascorer.calculateScore(m),
        "validity": lambda m: 1.0,
    }
    with Failures() as failures:
        found = settings(name).build()(samples_of(molecules, 12)).tolist()
        assert failures.taken() == ({} if name == "validity" else {"failed": 2.0})
    assert found[:3] == pytest.approx([of_smiles[name](Chem.MolFromSmiles(smiles)) for smiles in SMILES])
    assert found[3:] == [failure, failure]
    for value, known in zip(found, expected, strict=False):
        assert known is None or value == pytest.approx(known, abs=0.02)


def test_what_is_invalid_is_a_cost(molecules: list[Molecule]) -> None:
    found = settings("validity", sign="invalid").build()(samples_of(molecules, 12))
    assert found.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_validity_is_the_cost_of_a_utility_with_a_limit(molecules: list[Molecule]) -> None:
    """E r + b log(C - E c) with 2 of 5 invalid and C = 0.6: the price of being invalid is b / 0.2."""
    x = samples_of(molecules, 12)
    at = Known(x, reward={"reward": settings("qed").build(), "cost": settings("validity", sign="invalid").build()})
    barrier, qed = LogBarrier(limit=0.6, strength=0.1), settings("qed").build()(x)
    assert barrier.value(at).value == pytest.approx(qed.mean().item() + 0.1 * math.log(0.2), abs=1e-5)
    slope = barrier.first_variation(at)(x) - qed
    assert (slope[3:] - slope[0]).tolist() == pytest.approx([-0.5, -0.5], abs=1e-5)
    with pytest.raises(InputError, match=r"the mean cost, 0.4.*, is not below the limit 0.4"):
        LogBarrier(limit=0.4).value(at)


def test_the_gradient_of_the_force_field_is_that_of_finite_differences(molecules: list[Molecule]) -> None:
    """Of molecules of one part and of several; what has no bonds has the value of failures, and no slope."""
    x = samples_of(molecules, 12).double()
    x[..., :3] += 0.02 * torch.randn(x[..., :3].shape, generator=stream(0), dtype=x.dtype) * present(x)[..., None]
    reward = settings("mmff-energy", failure_value=-500.0).build()
    value, gradient = value_and_gradient(reward, x)
    way = torch.zeros_like(x)
    way[..., :3] = torch.randn(x[..., :3].shape, generator=stream(1), dtype=x.dtype) * present(x)[..., None]
    step = 1e-4
    slope = (reward(x + step * way) - reward(x - step * way)) / (2 * step)
    torch.testing.assert_close((gradient * way).sum((1, 2))[:4], slope[:4], rtol=1e-4, atol=1e-3)
    assert value[4] == -500.0
    assert not gradient[4].any()
    assert not gradient[..., 3:].any()


@pytest.mark.parametrize("name", ["mmff-energy", "qed", "logp", "sa-score", "validity"])
def test_the_rewards_hold_what_all_rewards_must(name: str, molecules: list[Molecule]) -> None:
    x = samples_of(molecules[:4], 12).double()
    x[..., :3] *= 1.01
    check_reward(settings(name).build(), x, gradient=name == "mmff-energy")


def test_geometries_are_at_rest_in_the_force_field(molecules: list[Molecule]) -> None:
    """They are its minima: the slope is small, and atoms that are moved lose."""
    reward, x = settings("mmff-energy").build(), samples_of(molecules[:3], 12)
    value, gradient = value_and_gradient(reward, x)
    assert gradient.flatten(1).norm(dim=1).max() < 0.1
    for seed in range(3):
        moved = x.clone()
        moved[..., :3] += 0.03 * torch.randn(x[..., :3].shape, generator=stream(seed, "moved")) * present(x)[..., None]
        assert (reward(moved) < value).all()


def test_strain_is_counted_from_the_nearest_minimum(molecules: list[Molecule]) -> None:
    """Zero at rest, whatever the molecule; the energy that relaxing sets free elsewhere, with the gradient of the energy."""
    plain, strain = settings("mmff-energy").build(), settings("mmff-energy", strain=True).build()
    x = samples_of(molecules[:3], 12).double()
    assert strain(x).abs().max() < 0.01
    assert plain(x).abs().max() > 1  # which the force field's own zero is far from
    x[..., :3] += 0.05 * torch.randn(x[..., :3].shape, generator=stream(0), dtype=x.dtype) * present(x)[..., None]
    drops = [each.drop for each in map(relaxed, molecules_of(x)) if each is not None]
    value, gradient = value_and_gradient(strain, x)
    assert value.tolist() == pytest.approx([-drop for drop in drops], rel=1e-3)
    assert min(drops) > 1
    torch.testing.assert_close(gradient, value_and_gradient(plain, x)[1])


def test_molecules_are_those_of_the_samples(molecules: list[Molecule]) -> None:
    """A change of the order of atoms changes no reward."""
    for name in ("qed", "logp", "sa-score", "mmff-energy"):
        reward = settings(name).build()
        turned = samples_of([Molecule(each.numbers[::-1].copy(), each.positions[::-1].copy()) for each in molecules], 14)
        torch.testing.assert_close(reward(turned), reward(samples_of(molecules, 12)), rtol=1e-4, atol=1e-3)
    assert [each.formula for each in molecules_of(samples_of(molecules, 12))][:3] == ["C2H6O", "C2H5NO", "C6H6"]
