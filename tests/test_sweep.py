"""A sweep runs every point once, goes on where it stopped, survives points that fail, and draws the front."""

from __future__ import annotations

import csv
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_recipe
from typer.testing import CliRunner

from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError
from tiltflow.reports.plots import pareto
from tiltflow.runs.sweep import COSTS, beats, collect, continues, parse_grid, points_of, run_point, sweep
from tiltflow.settings import read_yaml

METHOD = {"name": "orw-cfm-w2", "num_inference_steps": 2, "num_passes": 2, "min_effective_sample_size": 1}


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return read_yaml(tiny_recipe(tmp_path, method=METHOD))


def test_a_grid_is_read_as_yaml() -> None:
    grid = parse_grid(["method.alpha=0, 0.3,1e-1", "seed=[0, 1]", "method.weight_mode=raw,normalized"])
    assert grid == {"method.alpha": [0, 0.3, 0.1], "seed": [0, 1], "method.weight_mode": ["raw", "normalized"]}
    for wrong, message in (
        (["method.alpha"], "must read key=value,value"),
        (["method.alpha="], "must read key=value,value"),
        (["method.alpha=1,1"], "must give different values"),
        (["method.alpha=1", "method.alpha=2"], "method.alpha is given twice"),
        ([], "give at least one --over"),
    ):
        with pytest.raises(InputError, match=message):
            parse_grid(wrong)


def test_a_sweep_may_have_more_values_than_it_had() -> None:
    before = {"recipe": {"a": 1}, "over": {"method.beta": [1], "seed": [0, 1]}}
    for over, more in (
        ({"method.beta": [1], "seed": [0, 1, 2]}, True),
        ({"method.beta": [2, 1], "seed": [0, 1]}, True),
        ({"method.beta": [1], "seed": [1]}, False),
        ({"method.beta": [1]}, False),
        ({"seed": [0, 1], "method.beta": [1]}, False),  # whose folders have other names
    ):
        assert continues(before, {"recipe": {"a": 1}, "over": over}) == more
    assert not continues(before, {"recipe": {"a": 2}, "over": before["over"]})


def test_seeds_are_values_of_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--seeds 3` is --over seed=0,1,2, and nothing beside seeds need be given."""
    asked: list[Any] = []

    def stop(tree: Any, grid: Any, folder: Path, **options: Any) -> None:
        asked.append(grid)
        raise InputError("enough")

    monkeypatch.setattr("tiltflow.runs.sweep.sweep", stop)
    command = ["sweep", "sd15-image-reward", "-o", "runs/table", "--seeds", "3"]
    for over in (["--over", "method.beta=1,0.1,0.0316,0.01"], []):
        CliRunner().invoke(app, [*command, *over])
    assert asked == [{"method.beta": [1, 0.1, 0.0316, 0.01], "seed": [0, 1, 2]}, {"seed": [0, 1, 2]}]
    twice = CliRunner().invoke(app, [*command, "--over", "seed=1,2"])
    assert "seed is given twice" in str(twice.exception)


def test_points_are_named_by_their_values(tree: dict[str, Any]) -> None:
    points = points_of(tree, {"method.alpha": [0, 0.5], "training.train_batch_size": [4]}, "tiny")
    assert [point.name for point in points] == ["alpha=0,train_batch_size=4", "alpha=0.5,train_batch_size=4"]
    assert points[1].recipe.method.alpha == 0.5
    both = points_of(tree, {"method.num_inference_steps": [2], "sampling.num_inference_steps": [3]}, "tiny")
    assert both[0].name == "method.num_inference_steps=2,sampling.num_inference_steps=3"
    with pytest.raises(InputError, match=r"tiny, alpha=-1: method.alpha must be"):
        points_of(tree, {"method.alpha": [1, -1]}, "tiny")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each process of a sweep, as in all tests: several are slower where the models are small."""
    monkeypatch.setattr("tiltflow.runs.jobs.os.cpu_count", lambda: 1)


def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes of a sweep be copies of this one, which need not import everything first."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr("tiltflow.runs.jobs.multiprocessing.get_context", lambda method: context)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_sweep_from_grid_to_front(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, told = tmp_path / "sweep", []
    grid = {"method.alpha": [0, 1], "seed": [0, 1]}
    result = sweep(tree, grid, folder, processes=1, watch=lambda name, what: told.append((name, what)))
    assert sorted(told) == [(f"alpha={alpha},seed={seed}", "done") for alpha in (0, 1) for seed in (0, 1)]
    assert not list(folder.glob("*.partial"))
    runs = [json.loads((folder / f"alpha=0,seed={seed}" / "summary.json").read_text()) for seed in (0, 1)]
    first = result["points"][0]
    assert (first["alpha"], first["runs"]) == (0, 2)
    assert first["reward_tuned"] == pytest.approx((runs[0]["reward_tuned"] + runs[1]["reward_tuned"]) / 2)
    assert first["w2_base_std"] == pytest.approx(abs(runs[0]["w2_base"] - runs[1]["w2_base"]) / 2)
    assert first["w2_base_error"] == pytest.approx(first["w2_base_std"])  # of two values
    table = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [(row["alpha"], row["model"], row["runs"]) for row in table] == [
        (alpha, model, "2") for alpha in ("0", "1") for model in ("base", "tuned")
    ]
    key = runs[0]["reward"]
    both = [run["table"][1][key] for run in runs]
    assert float(table[1][key]) == pytest.approx(sum(both) / 2)
    assert float(table[1][f"{key}_error"]) == pytest.approx(abs(both[0] - both[1]) / 2)
    assert any(point["on_front"] for point in result["points"])
    picture = (folder / "pareto.svg").read_text()
    assert "alpha = 0" in picture
    assert "alpha = 1" in picture

    forked(monkeypatch)
    # again: nothing is run twice, a point that was cut off is gone on with, and one without a checkpoint is made anew
    written = (folder / "alpha=1,seed=0" / "summary.json").stat().st_mtime_ns
    (folder / "alpha=0,seed=1").rename(folder / "alpha=0,seed=1.partial")
    (folder / "alpha=0,seed=1.partial" / "summary.json").unlink()
    (folder / "alpha=1,seed=1").rename(folder / "alpha=1,seed=1.partial")
    shutil.rmtree(folder / "alpha=1,seed=1.partial" / "checkpoints")
    begun = (folder / "alpha=0,seed=1.partial" / "metrics.jsonl").read_text()
    told.clear()
    again = sweep(tree, grid, folder, processes=2, watch=lambda name, what: told.append((name, what)))
    assert dict(told) == {
        "alpha=0,seed=0": "already done",
        "alpha=0,seed=1": "done",
        "alpha=1,seed=0": "already done",
        "alpha=1,seed=1": "done",
    }
    assert (folder / "alpha=0,seed=1" / "metrics.jsonl").read_text() == begun  # the steps were not taken again
    assert (folder / "alpha=1,seed=0" / "summary.json").stat().st_mtime_ns == written
    for row, other in zip(again["runs"], result["runs"], strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}

    with pytest.raises(InputError, match="holds another sweep"):
        sweep(tree, {"method.alpha": [0]}, folder)
    with pytest.raises(InputError, match="already holds something"):
        sweep(tree, grid, tmp_path)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_point_that_fails_does_not_stop_the_others(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked(monkeypatch)
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    out, grid = tmp_path / "out", ["--over", "method.min_effective_sample_size=1,1000"]
    result = CliRunner().invoke(app, ["sweep", str(tmp_path / "recipe.yaml"), "-o", str(out), *grid, "--json"])
    assert result.exit_code == 1
    points = json.loads(result.stdout.splitlines()[-1])["points"]
    assert points[0]["runs"] == 1
    assert "the weights of 4 samples rest on" in points[1]["error"]
    report = (out / "min_effective_sample_size=1" / "report.html").read_text()
    assert "tiltflow sample ./min_effective_sample_size=1 " in report  # where the run lies in the end
    assert ".partial" not in report
    assert not (out / "min_effective_sample_size=1000").exists()
    assert (out / "pareto.svg").exists()


def test_wrong_grids_are_one_line(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    command = ["sweep", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "--over"]
    for over, message in (("method.alhpa=0,1", "did you mean 'alpha'"), ("alpha", "must read key=value")):
        result = CliRunner().invoke(app, [*command, over])
        assert isinstance(result.exception, InputError)
        assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_a_pipeline(tmp_path: Path) -> None:
    """Its points are recipes of pipelines, and what reward costs is the FID where there is a reference, else the path KL."""
    pytest.importorskip("diffusers")
    from test_run_text_to_image import recipe_for

    tree = recipe_for(tmp_path, "stable-diffusion")
    tree["training"] |= {"max_train_steps": 1}
    points = points_of(tree, {"method.beta": [0.5], "seed": [0]}, "tiny")
    assert [point.recipe.prompts.texts[0] for point in points] == ["a red cat"]
    folder = tmp_path / "sweep"
    assert [run_point(point, folder, "cpu") for point in points] == [None]
    result = collect(points, folder, {})
    assert result["distance"] == "path_kl"
    for point, row in zip(points, result["points"], strict=True):
        summary = json.loads((folder / point.name / "summary.json").read_text())
        assert row["path_kl"] == summary["path_kl"] > 0
        assert row["reward_tuned"] == summary["reward_tuned"]
        assert (row["vendi_base"], row["vendi_tuned"]) == tuple(each["vendi"] for each in summary["table"][:2])
        (folder / point.name / "summary.json").write_text(
            json.dumps(summary | {"table": [each | {"fid": 10.0 - i} for i, each in enumerate(summary["table"])]})
        )
    drawn = collect(points, folder, {})
    assert drawn["distance"] == "fid_tuned"
    assert drawn["points"][0]["fid_tuned"] == 9
    picture = pareto(drawn["points"], ["beta"], COSTS["fid_tuned"])
    assert "FID to the reference (dashed: the base's own)" in picture


def test_what_beats_what() -> None:
    def row(reward: float, distance: float) -> dict[str, float]:
        return {"reward_tuned": reward, "w2_base": distance}

    assert beats({"reward_tuned": 1, "kl": 0.1}, {"reward_tuned": 1, "kl": 0.2}, "kl")
    assert beats(row(2, 1), row(1, 1))
    assert beats(row(1, 0.5), row(1, 1))
    assert not beats(row(1, 1), row(1, 1))
    assert not beats(row(2, 2), row(1, 1))
    assert not beats(row(1, 1), row(2, 2))
