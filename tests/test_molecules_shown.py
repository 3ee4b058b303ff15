"""A run whose samples are molecules: its summary, files and report, and `tiltflow sample` of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import SUMMARY, Balanced, write
from test_validity import molecule, without
from torch import Tensor, nn

import tiltflow
from tiltflow.chemistry.atoms import TYPE, Molecule, samples_of
from tiltflow.chemistry.molecule_files import from_xyz, to_xyz
from tiltflow.commands.sample import check_suffix, write_samples
from tiltflow.errors import InputError
from tiltflow.evaluation.molecules import are_molecules
from tiltflow.flows.flow import Flow
from tiltflow.reports.molecules import DRAWING, decimals, drawing, molecule_grid, pairs_of
from tiltflow.reports.report import TEMPLATES
from tiltflow.rewards.functions.failures import count_failures

ATOMS = 14
LIBRARY = ("C", "CC", "CCO", "CCCC")


class Lookup(nn.Module):
    """The data under Gaussian noise, for a law of a few molecules: the mean of those that it may have been."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("known", samples_of([molecule(smiles) for smiles in LIBRARY], ATOMS))
        self.log_shares = nn.Parameter(torch.zeros(len(LIBRARY)))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        known, s = self.known, t.to(x.dtype)[:, None]
        away = (x[:, None] - s[..., None, None] * known).square().flatten(2).sum(2)  # type: ignore[operator]
        shares = (self.log_shares - away / (2 * (1 - s).clamp(min=0.02).square())).softmax(1)
        return torch.einsum("nk,kac->nac", shares, known)  # type: ignore[arg-type]


def carbons(x: Tensor) -> Tensor:
    return (x[..., 4] / TYPE).sum(-1)


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as opened:
        return opened.size


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("molecules") / "run"
    tiltflow.tune(
        tiltflow.Model(Flow(Lookup(), "x1"), (ATOMS, 8), tiltflow.Sampling(num_inference_steps=4)),
        carbons,
        tiltflow.AdjointMatching(beta=2.0, num_inference_steps=4),
        tiltflow.Training(max_train_steps=1, train_batch_size=8, monitor={"steps": 1, "num_samples": 16}),
        optimizer=tiltflow.Optimizer(learning_rate=0.3, lr_warmup_steps=0),
        evaluation=tiltflow.Evaluation(num_samples=256, grid=12),
        output=folder,
    )
    return folder


def test_a_run_of_molecules_is_measured_as_molecules(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    numbers = summary["molecules"]
    assert min(numbers["connected_tuned"], numbers["connected_base"]) > 0.95
    assert set(numbers["compositions"]["formulas"]) >= {"CH4", "C2H6", "C2H6O", "C4H10"}
    assert abs(numbers["gain_in_std"]) < 1
    assert summary["w2_space"] == "fingerprints"
    assert summary["diversity_in"] == "fingerprints of their bonds"
    statistics = [row["statistic"] for row in summary["tests"]]
    assert "mean number of atoms of C" in statistics
    looks = [json.loads(line) for line in (run / "monitor.jsonl").read_text().splitlines()]
    assert looks[-1]["measures"]["the share of valid molecules"][0] == 1


def test_the_files_of_a_run_have_the_same_molecules_with_their_rewards(run: Path) -> None:
    for side in ("before", "after"):
        several = from_xyz((run / f"{side}.xyz").read_text())
        assert len(several) == 12
        for one, reward in several:
            assert reward == pytest.approx((one.numbers == 6).sum(), abs=1e-3)
        assert size(run / f"{side}.png") == (6 * DRAWING[0], 2 * DRAWING[1])


def test_the_report_of_a_run_shows_them(run: Path) -> None:
    page = (run / "report.html").read_text()
    Balanced().feed(page)
    assert page.count("<canvas") == 24
    assert "Compositions" in page
    assert "Valid and connected, tuned" in page
    assert page.count("<img") == 0  # the drawings are in the page already


def test_a_page_of_molecules_is_whole_without_scripts_and_sources(tmp_path: Path) -> None:
    before, after = [molecule("CCO"), without(molecule("CC(N)=O"), 8)], [molecule("FC(F)F"), molecule("C")]
    for name, several in (("before", before), ("after", after)):
        tmp_path.joinpath(f"{name}.xyz").write_text(to_xyz(several, [1.0, float("nan")]))
    page = write(tmp_path, SUMMARY)
    parsed = Balanced()
    parsed.feed(page)
    assert not parsed.open
    assert all(source.startswith("data:") for source in parsed.sources)
    plain = re.sub(r"<script\b.*?</script>", "", page, flags=re.DOTALL)
    assert "C<sub>2</sub>H<sub>6</sub>O · 1.00" in plain
    assert "no bonds fit these atoms" in plain
    assert plain.count("<canvas hidden") == 4, "they are seen only where a script draws them"


def test_pairs_are_of_the_same_noise_in_their_order() -> None:
    library = [molecule(smiles) for smiles in LIBRARY]
    pairs = pairs_of(to_xyz(library, [1, 2, 3, 4]), to_xyz(library[::-1], [5, 6, 7, 8]))
    assert [(one.words, one.note, other.words, other.note) for one, other in pairs] == [
        ("CH4", "1.00", "C4H10", "5.00"), ("C2H6", "2.00", "C2H6O", "6.00"),
        ("C2H6O", "3.00", "C2H6", "7.00"), ("C4H10", "4.00", "CH4", "8.00"),
    ]  # fmt: skip
    symbols = [row.split(" ") for row in pairs[0][0].atoms.split(";")]
    assert [row[0] for row in symbols] == ["C", "H", "H", "H", "H"]
    assert np.allclose([[float(each) for each in row[1:]] for row in symbols], library[0].positions, atol=0.01)


def test_drawings_have_the_colours_of_the_page() -> None:
    """Elements by the variables of the page, all others in ink."""
    text = drawing(molecule("FCC(N)=O"))
    assert set(re.findall(r"#[0-9a-fA-F]{6}", re.sub(r"var\([^)]*\)", "", text))) == set()
    assert set(re.findall(r"var\(--(\w+)", text)) == {"ink", "N", "O", "F"}
    css = (TEMPLATES / "page.css").read_text()
    for name in ("ink", "H", "C", "N", "O", "F", "edge"):
        assert len(re.findall(rf"--{name}: light-dark\(", css)) == 1, "light and dark"
    assert drawing(without(molecule("C"), 4)) == ""


def test_molecules_are_written_as_what_the_name_of_the_file_says(tmp_path: Path) -> None:
    several = [molecule(smiles) for smiles in LIBRARY]
    x = samples_of([*several, without(several[0], 4)], ATOMS)
    assert are_molecules(x)
    for suffix in (".png", ".xyz", ".sdf", ".npz"):
        check_suffix(tmp_path / f"a{suffix}", (ATOMS, 8))
        write_samples(tmp_path / f"a{suffix}", x, 3)
    assert size(tmp_path / "a.png") == (3 * DRAWING[0], 2 * DRAWING[1])
    assert [one.formula for one, _ in from_xyz((tmp_path / "a.xyz").read_text())] == ["CH4", "C2H6", "C2H6O", "C4H10", "CH3"]
    assert (tmp_path / "a.sdf").read_text().count("$$$$") == 5
    assert np.load(tmp_path / "a.npz")["samples"].shape == (5, ATOMS, 8)
    wrong = (("a.gif", (ATOMS, 8), ".png or .npz"), ("a.xyz", (3, 8, 8), ".png or .npz"), ("a.sdf", (2,), ".npz"))
    for name, shape, use in wrong:
        with pytest.raises(InputError, match=re.escape(f"use {use}")):
            check_suffix(tmp_path / name, shape)


def test_a_grid_has_a_place_for_what_is_not_valid() -> None:
    """Where the others have a drawing, it has words; and one without atoms has too."""
    for each in (molecule("c1ccccc1O"), without(molecule("C"), 4), Molecule(np.zeros(0, np.int64), np.zeros((0, 3)))):
        grey = np.asarray(molecule_grid([each], 1).convert("L"))
        assert (grey[: DRAWING[1] // 2 + 10] < 100).any()


def test_rewards_that_could_not_be_computed_are_told(tmp_path: Path) -> None:
    """By a share of the samples, and in words."""
    folder = tmp_path / "run"

    def half(x: Tensor) -> Tensor:
        few = carbons(x) < 2.5
        count_failures(int(few.sum()))
        return torch.where(few, 0.0, carbons(x))

    with pytest.warns(UserWarning, match=r"the reward could not be computed for \d+ of the first 32 samples"):
        tiltflow.tune(
            tiltflow.Model(Flow(Lookup(), "x1"), (ATOMS, 8), tiltflow.Sampling(num_inference_steps=4)),
            half,
            tiltflow.AdjointMatching(beta=2.0, num_inference_steps=4),
            tiltflow.Training(max_train_steps=1, train_batch_size=32),
            evaluation=tiltflow.Evaluation(num_samples=128, grid=128),
            output=folder,
        )
    summary = json.loads((folder / "summary.json").read_text())
    failed = sum(reward == 0 for _, reward in from_xyz((folder / "before.xyz").read_text()))
    assert summary["failed_base"] == failed / 128
    assert 0.6 < summary["failed_base"] < 0.9  # three of the four molecules
    words = f"for {failed} of the base's 128 samples"
    assert any(words in limit for limit in summary["limits"])
    assert any("in part that of the value for failures" in limit for limit in summary["limits"])
    (step,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert summary["failed_training"] == step["failed"] / 32
    for name in ("tuned", "training"):
        assert f"Failed rewards, {name}" in (folder / "report.html").read_text()


def test_rewards_of_isomers_are_told_apart() -> None:
    """Two digits of their spread; one far away, such as the value of a failure, changes nothing."""
    assert decimals([29.53, 29.56, 29.59, 29.62, 0.0]) == 3  # the median distance is 0.03
    assert decimals([1.0, 3.0, 5.0]) == 1
    assert decimals([100.0, 300.0, 500.0]) == 0
    assert decimals([2.0, 2.0, 7.0]) is None
    assert decimals([]) is None
    few = [molecule("C"), molecule("CC"), molecule("CCC")]
    text = to_xyz(few, [29.53, 29.56, 29.62])
    assert [before.note for before, _ in pairs_of(text, text)] == ["29.530", "29.560", "29.620"]
