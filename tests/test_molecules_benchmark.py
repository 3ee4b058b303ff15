"""The table of tuned models of molecules that benchmarks/molecules.py makes of summaries."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tiltflow.chemistry.atoms import molecules_of
from tiltflow.chemistry.geometries import load_geometries, made_of, save
from tiltflow.chemistry.relaxation import relaxed
from tiltflow.chemistry.workers import Workers

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "molecules.py"))


def summary(shift: float) -> dict[str, Any]:
    """Of 400 samples: a base of mean 2 and standard deviation 1.5, and a tuned model `shift` above it."""
    molecules: dict[str, Any] = {
        "others_relaxed_base": {"dipole": [1.9, 0.08]},
        "others_relaxed_tuned": {"dipole": [3.1, 0.09]},
    }
    for side, valid in (("base", 0.95), ("tuned", 0.9)):
        molecules |= {f"connected_{side}": valid, f"connected_{side}_error": 0.012, f"unique_{side}": valid}
        molecules |= {f"reward_relaxed_{side}": 70.0, f"reward_relaxed_{side}_error": 0.3}
    rows = [{"sum": 70.0, "dipole": mean, "dipole_error": 0.075} for mean in (2.0, 2.0 + shift)]
    return {"table": rows, "molecules": molecules, "num_samples": 400, "path_kl": 3.0}


def test_rows_are_those_of_the_runs_and_their_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is trained where there is a summary."""
    for seed, shift in ((0, 1.5), (3, 1.8)):
        folder = tmp_path / f"qm9-dipole-{seed}"
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(summary(shift)))
    SCRIPT["main"](["tuned", "--output", str(tmp_path), "--recipes", "qm9-dipole", "--seeds", "0", "3"])
    heads, _, first, second, mean = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()
    )
    assert len(heads) == len(first) == len(mean)
    row = dict(zip(heads, first, strict=True))
    assert (row["recipe"], row["seed"], row["samples"], row["path KL"]) == ("`qm9-dipole`", "0", "400", "3.0")
    assert (row["base"], row["tuned"]) == ("2.000 ± 0.075", "3.500 ± 0.075")
    assert row["gain in sd"] == "1.000 ± 0.071"  # 1.5 and 0.075 sqrt(2), over 0.075 sqrt(400)
    assert (row["valid and connected"], row["relaxed"]) == ("95.0 ± 1.2% to 90.0 ± 1.2%", "1.900 ± 0.080 to 3.100 ± 0.090")
    assert dict(zip(heads, second, strict=True))["gain in sd"].startswith("1.2")
    row = dict(zip(heads, mean, strict=True))
    assert (row["seed"], row["gain in sd"]) == ("mean of 2", "1.100 ± 0.050")


def test_a_run_of_an_energy_shows_its_own_reward_relaxed() -> None:
    own = summary(1.0)
    own["table"] = [{"xtb-energy": mean, "xtb-energy_error": 0.2} for mean in (20.0, 21.0)]
    found = SCRIPT["numbers_of"](own, "xtb-energy")
    assert (found["relaxed_tuned"], found["relaxed_tuned_error"]) == (70.0, 0.3)
    assert found["gain"] == pytest.approx(1 / 4)
    assert found["gain_error"] == pytest.approx(0.2 * math.sqrt(2) / 4)


def test_geometries_to_finish_a_model_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that are valid, relaxed, with twice as many of the data, and double bonds again."""
    pytest.importorskip("rdkit")
    made = made_of(["C=C", "CC", "CCO", "C#C", "CN"], Workers())
    samples = made.samples()[:3].clone()
    samples[:, :, :3] *= 1.02  # strained
    samples[2, 1:, :3] += 5.0 * torch.arange(1, samples.shape[1])[:, None]  # no molecule
    save(made, tmp_path / "data.npz")

    def load(name: str) -> Any:
        assert name == "some-model"
        return SimpleNamespace(sample=lambda count, seed: samples[:count])

    monkeypatch.setitem(SCRIPT["relax_samples"].__globals__, "load", load)
    place = tmp_path / "own.npz"
    SCRIPT["main"](["relaxed", "some-model", str(tmp_path / "data.npz"), "--count", "3", "--output", str(place)])
    found = load_geometries(place)
    own, rest = found.smiles[:2].tolist(), found.smiles[2:].tolist()
    assert own == ["C=C", "CC"]
    several = 2 + sum(each in ("C=C", "C#C") for each in rest[:4])
    of_data, again, often = rest[:4], rest[4 : 4 + several], rest[4 + several :]
    assert len(set(of_data)) == 4
    assert set(of_data) <= {"C=C", "CC", "CCO", "C#C", "CN"}
    assert again == ["C=C", *(each for each in of_data if each in ("C=C", "C#C")), "C=C"]
    assert often == 2 * (own + of_data + again).count("C=C") * ["C=C"]
    for molecule in found.molecules()[:2]:
        once_more = relaxed(molecule)
        assert once_more is not None
        assert once_more.drop < 0.01
    assert relaxed(molecules_of(samples)[0]).drop > 0.1  # type: ignore[union-attr]
