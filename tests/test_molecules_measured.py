"""What an evaluation measures of molecules, on molecules that are known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_validity import WHOLE, beside, molecule, without

from tiltflow.chemistry.atoms import TYPE, Molecule, molecules_of, samples_of
from tiltflow.chemistry.molecule_files import from_xyz, to_sdf, to_xyz
from tiltflow.chemistry.relaxation import onto, relaxed
from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.evaluation.metrics.molecules import gain, known_smiles, measure, of_rewards
from tiltflow.evaluation.molecules import are_molecules, connected, fingerprints
from tiltflow.evaluation.samples import Asked, Instruments, Samples, Seen
from tiltflow.evaluation.settings import Evaluation
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.runs.watch import VALID, in_pictures
from tiltflow.streams import stream

ATOMS = 20
CARBON = 3 + 1  # channel of its type


def carbons(x: torch.Tensor) -> torch.Tensor:
    """A reward of the composition alone."""
    return (x[..., CARBON] / TYPE).sum(-1)


def turned(one: Molecule, seed: int = 0) -> Molecule:
    """The same, turned and with its atoms in another order."""
    generator = np.random.default_rng(seed)
    rotation, order = np.linalg.qr(generator.normal(size=(3, 3)))[0], generator.permutation(len(one))
    rotation[:, 0] *= np.sign(np.linalg.det(rotation))
    return Molecule(one.numbers[order], one.positions[order] @ rotation)


def seen(base: torch.Tensor, tuned: torch.Tensor, beta: float, data: str | None = None, groups: int = 1) -> Seen:
    reward = from_function(carbons)
    asked = Asked.of_samples(len(base))
    if groups > 1:
        asked = Asked.of_classes([Item(str(i), {"label": i}) for i in range(groups)], len(base))
    own = {"carbons": carbons(base)}, {"carbons": carbons(tuned)}
    samples = Samples(base, tuned, *own, carbons(base) / beta, asked, (0, 5))
    instruments = Instruments({"carbons": reward, "held-out": from_function(lambda x: 2 * carbons(x))}, None, None, 64, "cpu")
    return Seen(samples, instruments, Evaluation(data=data), stream(0, "bootstrap"))


@pytest.fixture(scope="module")
def library() -> dict[str, Molecule]:
    return {smiles: molecule(smiles) for smiles in ("C", "CC", "CCO", "CCCC")}


def of_counts(library: dict[str, Molecule], counts: dict[str, int]) -> torch.Tensor:
    return samples_of([turned(library[smiles], i) for smiles, count in counts.items() for i in range(count)], ATOMS)


def test_molecules_are_told_from_other_samples() -> None:
    """By their shape and by their centres, which are at zero."""
    x = samples_of([molecule("CCO"), molecule("C")], ATOMS)
    assert are_molecules(x)
    assert not are_molecules(x + 0.1)
    assert not are_molecules(torch.randn(5, ATOMS, 8))
    assert not are_molecules(torch.zeros(5, 3, 8, 8))


def test_what_the_monitor_sees_of_molecules() -> None:
    x = samples_of([molecule("CCO"), without(molecule("C"), 4), beside(molecule("C"), molecule("C"))], ATOMS)
    assert connected(x).tolist() == [1, 0, 0] == in_pictures(x)[VALID].tolist()


def test_fingerprints_are_of_the_bonds_alone() -> None:
    plain = [molecule(smiles) for smiles in WHOLE]
    found = fingerprints(samples_of([*plain, *(turned(one) for one in plain), without(plain[0], 4)], ATOMS))
    first, again = found[:-1].chunk(2)
    assert torch.equal(first, again)
    assert len(first.unique(dim=0)) == len(WHOLE)
    assert found[-1].abs().sum() == 0


def test_the_relaxed_are_near_and_stretched_molecules_are_not() -> None:
    """Geometries of `molecule` are relaxed. A bond that is longer by d = 0.1 Å has the energy of its spring, of C-C in MMFF94
    143.9325 k / 2 d^2 (1 - 2 d + 7/3 d^2) with k = 4.258 (Halgren 1996), and little of atoms that are not bonded."""
    ethane = molecule("CC")
    same = relaxed(turned(ethane))
    assert same is not None
    assert same.drop == pytest.approx(0, abs=0.01)
    assert same.rmsd == pytest.approx(0, abs=0.02)
    carbons, axis = np.flatnonzero(ethane.numbers == 6), np.zeros((len(ethane), 1))
    way = ethane.positions[carbons[1]] - ethane.positions[carbons[0]]
    near = np.linalg.norm(ethane.positions - ethane.positions[carbons[1]], axis=1) < 1.3  # one half of it
    axis[near] = 0.1
    pulled = relaxed(Molecule(ethane.numbers, ethane.positions + axis * way / np.linalg.norm(way)))
    assert pulled is not None
    assert pulled.drop == pytest.approx(143.9325 * 4.258 / 2 * 0.1**2 * (1 - 0.2 + 7 / 300), rel=0.1)
    assert 0.03 < pulled.rmsd < 0.06  # about half of it, as both halves move
    assert relaxed(without(ethane, 4)) is None


def test_positions_are_laid_onto_others_by_rotations_alone() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(9, 3))
    rotation = np.linalg.qr(generator.normal(size=(3, 3)))[0]
    rotation[:, 0] *= np.sign(np.linalg.det(rotation))
    assert np.allclose(onto(x @ rotation + 5, x), x)
    assert not np.allclose(onto(-x, x), x, atol=0.1), "a mirror image"


def test_measures_of_a_model_that_follows_the_target_law(library: dict[str, Molecule]) -> None:
    """The base has 1, 2 and 4 carbons at shares 1/2, 1/4, 1/4; at a temperature of 1 / log 2 the target has 1/2 * 2, 1/4 * 4,
    1/4 * 16 over their sum 6: shares 1/6, 1/6, 4/6."""
    base = of_counts(library, {"C": 120, "CCO": 60, "CCCC": 60})
    tuned = of_counts(library, {"C": 40, "CCO": 40, "CCCC": 160})
    found = measure(seen(base, tuned, 1 / math.log(2)))
    numbers = found.entries["molecules"]
    shown = numbers["compositions"]
    order = [shown["formulas"].index(name) for name in ("CH4", "C2H6O", "C4H10")]
    shares = {key: [round(shown[key][i], 6) for i in order] for key in ("base", "tuned", "target")}
    exact = [round(each, 6) for each in (1 / 6, 1 / 6, 4 / 6)]
    assert shares == {"base": [0.5, 0.25, 0.25], "tuned": exact, "target": exact}
    assert shown["number"] == 3
    assert numbers["composition_distance"] == pytest.approx(0, abs=1e-6)
    assert numbers["composition_distance_base"] == pytest.approx(5 / 12)
    assert 0 < numbers["composition_distance_floor"] < 0.1
    assert (numbers["connected_base"], numbers["connected_tuned"], numbers["valid_tuned"]) == (1, 1, 1)
    assert (numbers["unique_base"], numbers["unique_tuned"]) == (3 / 240, 3 / 240)
    assert numbers["unscored_base"] == 0
    assert numbers["unscored_tuned"] == 5 / 245
    assert numbers["relaxing_drop_tuned"] == pytest.approx(0, abs=0.05)
    assert numbers["reward_relaxed_base"] == pytest.approx(2.0)
    assert numbers["reward_relaxed_tuned"] == pytest.approx(19 / 6)
    assert numbers["others_relaxed_base"]["held-out"][0] == pytest.approx(4.0)
    assert numbers["others_relaxed_tuned"]["held-out"] == pytest.approx([19 / 3, 2 * numbers["reward_relaxed_tuned_error"]])
    assert set(numbers["others_relaxed_base"]) == {"held-out"}
    assert numbers["superquantile_90_base"] == 4 == numbers["superquantile_98_tuned"]
    tests = {row["statistic"]: row["p"] for row in found.tests}
    assert set(tests) == {f"mean number of atoms of {symbol}" for symbol in "HCO"} | {"total variation of the formulas"}
    assert min(tests.values()) > 0.9


def test_a_model_of_wrong_and_broken_molecules_is_told(library: dict[str, Molecule]) -> None:
    broken = [without(library["CCCC"], 4) for _ in range(80)]
    base = torch.cat([of_counts(library, {"C": 100, "CC": 100}), samples_of(broken[:40], ATOMS)])
    tuned = torch.cat([of_counts(library, {"CC": 160}), samples_of(broken, ATOMS)])
    found = measure(seen(base, tuned, 10.0))
    assert found.entries["molecules"]["connected_base"] == pytest.approx(200 / 240)
    assert found.entries["molecules"]["connected_tuned"] == pytest.approx(160 / 240)
    p = {row["statistic"]: row["p"] for row in found.tests}
    assert p["share of valid, connected molecules"] < 1e-3
    assert p["mean number of atoms of C"] < 1e-3
    assert p["total variation of the formulas"] < 0.01


def test_isomers_have_one_composition_and_no_distance(library: dict[str, Molecule]) -> None:
    x = of_counts(library, {"CC": 240})
    found = measure(seen(x, x, 1.0, groups=2))
    for key in ("", "_base", "_floor"):
        assert found.entries["molecules"][f"composition_distance{key}"] == pytest.approx(0, abs=1e-9)
    assert found.entries["molecules"]["gain_in_std"] is None
    assert [row for row in found.tests if row is not None] == []


def test_molecules_are_new_that_are_not_in_the_data(library: dict[str, Molecule], tmp_path: Path) -> None:
    (tmp_path / "known.csv").write_text("smiles\nOCC\nC\n")
    x = of_counts(library, {"C": 4, "CCO": 4, "CCCC": 2, "CC": 2})
    numbers = measure(seen(x, x, 10.0, data=str(tmp_path / "known.csv"))).entries["molecules"]
    assert numbers["novel_base"] == 2 / 4
    assert "novel_base" not in measure(seen(x, x, 10.0)).entries["molecules"]
    with pytest.raises(InputError, match=r"absent\.csv"):
        known_smiles(Evaluation(data=str(tmp_path / "absent.csv")))


def test_tails_and_their_intervals() -> None:
    """Of a normal law the superquantile at 0.9 is its density at its quantile 1.2816, over 0.1: 1.755; and the interval of the
    bootstrap has the width of that of the mean of the tail."""
    rewards = torch.randn(4000, generator=stream(3, "rewards"))
    found = of_rewards(rewards, stream(0, "bootstrap"))
    assert found["superquantile_90"] == pytest.approx(1.755, abs=4 * found["superquantile_90_error"])
    assert found["superquantile_98"] == pytest.approx(2.421, abs=4 * found["superquantile_98_error"])
    low, high = found["superquantile_90_interval"]
    assert high - low == pytest.approx(2 * 1.96 * found["superquantile_90_error"], rel=0.15)
    # variance of (r - q)+ / s at s = 0.1, by numbers: E[(r-q)^2+] = 0.1694 (1 + q^2) - .. is 0.0340; over s^2, less the mean
    exact = math.sqrt((0.0340 - (0.1755 - 0.12816) ** 2) / 0.01 / 4000)
    assert found["superquantile_90_error"] == pytest.approx(exact, rel=0.2)
    assert of_rewards(rewards[:9], stream(0, "bootstrap")) == {"superquantile_90": None, "superquantile_98": None}


def test_the_gain_is_in_units_of_the_spread_of_the_base() -> None:
    base = torch.linspace(-1, 1, 101, dtype=torch.float64) * 3
    found = gain(base, base + 2)
    assert found["gain_in_std"] == pytest.approx(2 / base.std().item())
    assert gain(torch.ones(5), torch.ones(5))["gain_in_std"] is None


def test_files_of_molecules_are_read_again(library: dict[str, Molecule]) -> None:
    from rdkit import Chem

    several = [library["CCO"], without(library["C"], 4), library["CCCC"]]
    again = from_xyz(to_xyz(several, [1.5, math.nan, -2.25]))
    assert [reward for _, reward in again if reward == reward] == [1.5, -2.25]
    for (one, _), other in zip(again, several, strict=True):
        assert one.numbers.tolist() == other.numbers.tolist()
        assert np.abs(one.positions - other.positions).max() < 1e-5
    assert from_xyz(to_xyz(several[:1]))[0][1] is None
    with pytest.raises(ValueError, match="atoms at line 1"):
        from_xyz("3\n\nH 0 0 0\n")
    supplier = Chem.SDMolSupplier()
    supplier.SetData(to_sdf(several), removeHs=False)
    theirs = list(supplier)
    assert [each.GetNumAtoms() for each in theirs] == [len(one) for one in several]
    assert [each.GetProp("valid") for each in theirs] == ["1", "0", "1"]
    assert Chem.MolToSmiles(Chem.RemoveHs(theirs[0])) == "CCO"
    assert [each.GetNumBonds() for each in theirs] == [8, 3, 13]  # a methyl has its three, and no hydrogen that is not there
    assert theirs[1].GetNumAtoms(onlyExplicit=False) == 4
    nowhere = replace(several[0], positions=np.full((9, 3), np.nan))
    assert "nan" in to_sdf([nowhere])
    assert ">  <valid>\n0\n" in to_sdf([nowhere])
    assert molecules_of(samples_of(several, ATOMS))[0].formula == "C2H6O"
