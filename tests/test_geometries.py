"""Geometries from SMILES: bond lengths that chemistry knows, the cache, what is left out, and input that is wrong."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from tiltflow.chemistry import geometries
from tiltflow.chemistry.atoms import molecules_of
from tiltflow.chemistry.geometries import Geometries, counts_of, load, load_geometries, read_smiles, save
from tiltflow.chemistry.workers import Crashed, Workers
from tiltflow.errors import InputError

SMILES = ["C", "CCO", "OCC", "[NH3+]CC(=O)[O-]", "[CH2]C", "O.O", "C#N", "CF"]


@pytest.fixture(scope="module")
def workers() -> Workers:
    return Workers(1)


def written(folder: Path, lines: list[str], name: str = "molecules.smi") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def some() -> Geometries:
    """Hydrogen and water, of which bonds are not asked."""
    numbers = np.array([[1, 1, 0], [8, 1, 1]], dtype=np.int8)
    positions = np.arange(18, dtype=np.float32).reshape(2, 3, 3)
    positions[0, 2] = 0
    return Geometries(numbers, positions, np.array(["[H][H]", "O"]), {"charges": 3})


def test_geometries_of_a_file(tmp_path: Path) -> None:
    """Bond lengths within .03 Å of the experiment's; what has charges, radicals or parts is counted; the cache has the same."""
    pytest.importorskip("rdkit", reason="the extra molecules is not installed")
    path, seen = written(tmp_path, ["smiles", *SMILES], "molecules.csv"), []
    made = load_geometries(path, cache=tmp_path / "cache", num_workers=1, watch=lambda done, total: seen.append((done, total)))
    assert made.smiles.tolist() == ["C", "CCO", "OCC", "C#N", "CF"]
    assert made.left_out == {"charges": 1, "radicals": 1, "several parts": 1}
    assert seen == [(k, 5) for k in range(1, 6)]
    methane, ethanol, _, cyanide, fluoromethane = made.molecules()
    assert (methane.formula, ethanol.formula, cyanide.formula) == ("CH4", "C2H6O", "CHN")
    for molecule, a, b, length in ((methane, 0, 1, 1.09), (ethanol, 0, 1, 1.51), (ethanol, 1, 2, 1.43), (cyanide, 0, 1, 1.16)):
        assert np.linalg.norm(molecule.positions[a] - molecule.positions[b]) == pytest.approx(length, abs=0.03)
    assert np.linalg.norm(fluoromethane.positions[0] - fluoromethane.positions[1]) == pytest.approx(1.38, abs=0.03)
    assert np.abs(made.positions.sum(1)).max() < 1e-5
    assert [each.formula for each in molecules_of(made.samples(12))] == [each.formula for each in made.molecules()]

    seen.clear()
    again = load_geometries(path, cache=tmp_path / "cache", watch=lambda done, total: seen.append((done, total)))
    assert not seen
    assert np.array_equal(again.positions, made.positions)
    assert again.left_out == made.left_out
    (file,) = (tmp_path / "cache").iterdir()
    assert len(load_geometries(file, formula="OC2H6")) == 2
    assert load_geometries(file, max_heavy_atoms=1).smiles.tolist() == ["C"]
    with pytest.raises(InputError, match="none of 5 molecules passes max_heavy_atoms 1 and formula C2H6"):
        load_geometries(file, max_heavy_atoms=1, formula="C2H6")


def test_geometries_depend_on_the_seed_and_their_smiles_alone(tmp_path: Path, workers: Workers) -> None:
    pytest.importorskip("rdkit", reason="the extra molecules is not installed")
    first = geometries.made_of(["CCO", "CCCN"], workers)
    turned = geometries.made_of(["CCCN", "CCO"], workers)
    assert np.array_equal(first.positions[0], turned.positions[1])
    assert not np.array_equal(first.positions[0], geometries.made_of(["CCO"], workers, seed=1).positions[0, :9])
    several = geometries.made_of(["CCO"], workers, conformers=3)
    assert several.describe() == "3 geometries of 1 molecule"


WRONG = [
    (["C", "C(", "CC", "xyz"], {}, r"m.smi, line 2: 'C\(' is no SMILES, and 1 more are none"),
    (["C", "CS", "CCl"], {}, "m.smi, line 2: 'CS' has S; known elements: H, C, N, O, F"),
    (["[NH4+]"], {}, r"m.smi: no molecule has a geometry \(0 geometries of 0 molecules; left out: 1 \(charges\)\)"),
    (["C", "N"], {"formula": "CH3F"}, "m.smi: none of 2 molecules passes formula C1H3F1"),
]


@pytest.mark.parametrize(("lines", "filters", "message"), WRONG)
def test_wrong_smiles_are_one_line(tmp_path: Path, lines: list[str], filters: dict[str, str], message: str) -> None:
    pytest.importorskip("rdkit", reason="the extra molecules is not installed")
    with pytest.raises(InputError, match=message):
        load_geometries(written(tmp_path, lines, "m.smi"), cache=tmp_path / "cache", num_workers=1, **filters)  # type: ignore[arg-type]
    assert not (tmp_path / "cache").exists()


def test_wrong_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none.smi: cannot be read \(No such file or directory\); give a file of SMILES"):
        read_smiles(tmp_path / "none.smi")
    for lines in ([], ["", "  "], ["smiles"]):
        with pytest.raises(InputError, match=r"empty.csv: has no SMILES"):
            read_smiles(written(tmp_path, lines, "empty.csv"))
    np.savez(tmp_path / "other.npz", x_train=np.zeros(3))
    with pytest.raises(InputError, match=r"other.npz: no geometries of molecules"):
        load_geometries(tmp_path / "other.npz")
    for formula in ("", "C7H", "c7", "C7 H10"):
        if formula == "C7H":
            assert counts_of(formula) == {"C": 7, "H": 1}
        else:
            with pytest.raises(InputError, match="must be like C7H10O2"):
                counts_of(formula)
    with pytest.raises(InputError, match="unknown element 'Cl'"):
        counts_of("CH3Cl")


def test_smiles_of_files_of_any_kind(tmp_path: Path) -> None:
    """With their lines: words of a text, a column of a table, packed or not."""
    assert read_smiles(written(tmp_path, ["C methane", "", "CC\tethane"])) == [(1, "C"), (3, "CC")]
    assert read_smiles(written(tmp_path, ["id,SMILES", "1,C", '2,"CC"'])) == [(2, "C"), (3, "CC")]
    (tmp_path / "packed.gz").write_bytes(gzip.compress(b"smiles\nC\nO\n"))
    assert read_smiles(tmp_path / "packed.gz") == [(2, "C"), (3, "O")]


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    save(some(), tmp_path / "some.npz")
    again = load(tmp_path / "some.npz")
    assert np.array_equal(again.numbers, some().numbers)
    assert np.array_equal(again.positions, some().positions)
    assert (again.smiles.tolist(), again.left_out) == (["[H][H]", "O"], {"charges": 3})
    assert [each.numbers.tolist() for each in again.molecules()] == [[1, 1], [8, 1, 1]]


def test_a_process_that_ends_costs_what_it_was_computing(workers: Workers) -> None:
    """And the next item has a new one; an exception is raised here, with what it said."""
    assert isinstance(next(workers.map(os._exit, [3])), Crashed)
    assert list(workers.map(abs, [-1, 2, -3])) == [1, 2, 3]
    with pytest.raises(RuntimeError, match="TypeError: bad operand"):
        list(workers.map(abs, ["text"]))  # type: ignore[arg-type]
    assert list(workers.map(os.getenv, ["OMP_NUM_THREADS"])) == ["1"]


@pytest.mark.skipif(os.name != "posix", reason="signals reach groups of processes on POSIX")
def test_ctrl_c_in_the_terminal_does_not_reach_them(workers: Workers) -> None:
    """It goes to the group of processes that we are in: a run that ends in order still needs them."""
    assert list(workers.map(eval, ["__import__('os').getpgrp()"])) != [os.getpgrp()]


def test_processes_end_with_what_has_them() -> None:
    workers = Workers(1)
    process = int(str(next(workers.map(eval, ['__import__("os").getpid()']))))
    del workers
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
