"""What a tracker is told, read back from the files of a real one."""

from __future__ import annotations

import json
import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_recipe

from tiltflow.errors import InputError
from tiltflow.evaluation.metrics import described
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.runs.trackers import Tracker
from tiltflow.settings import read_yaml, validate

pytest.importorskip("accelerate")


def recipe_for(folder: Path, **training: Any) -> Recipe:
    path = tiny_recipe(folder, training={"max_train_steps": 4, "train_batch_size": 4} | training)
    return validate(Recipe, read_yaml(path), "recipe")


def events(folder: Path) -> list[Any]:
    """TensorBoard's own format: records of length, checksum, protocol buffer, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def test_tensorboard_is_told_what_the_metrics_say_and_shown_the_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    run(recipe_for(tmp_path, report_to="tensorboard", monitor={"steps": 2, "num_samples": 8}), tmp_path / "run")
    values = [(event.step, value) for event in events(tmp_path / "run" / "logs") for value in event.summary.value]
    for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        for key in ("reward", "loss", "path_kl", "network_evaluations"):
            (said,) = [value.simple_value for step, value in values if (step, value.tag) == (row["step"], key)]
            assert said == pytest.approx(row[key], rel=1e-6)
    assert {step for step, value in values if value.tag == "monitor/reward"} == {2, 4}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (reached,) = [value.simple_value for _, value in values if value.tag == "summary/reward_tuned"]
    assert reached == pytest.approx(summary["reward_tuned"], rel=1e-6)
    (legend,) = [value.tensor.string_val[0].decode() for _, value in values if value.tag.startswith("metrics")]
    assert f"| {described('training')['reward'].meaning} Expect:" in legend
    for name in ("before", "after"):
        (shown,) = [value.image for _, value in values if value.tag == name]
        with Image.open(tmp_path / "run" / f"{name}.png") as picture:
            assert (shown.width, shown.height) == picture.size


def test_a_tracker_changes_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    for name, report_to in (("with", "tensorboard"), ("without", None)):
        run(recipe_for(tmp_path, report_to=report_to), tmp_path / name)
    same = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert same[0] == same[1]
    assert not (tmp_path / "without" / "logs").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_the_others_are_told(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Through the tracker of accelerate and a stand-in for the service's own module."""
    logged: list[dict[str, Any]] = []
    configured: dict[str, Any] = {}

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            logged.append({"step": step, **values})

        def finish(self) -> None:
            logged.append({"finished": True})

    config = types.SimpleNamespace(update=lambda values, **options: configured.update(values))
    module = types.SimpleNamespace(init=lambda **options: Run(), config=config, Image=lambda pixels: pixels.shape)
    monkeypatch.setitem(sys.modules, name, module)
    Image.fromarray(np.zeros((4, 6), dtype=np.uint8)).save(tmp_path / "after.png")
    tracker = Tracker.start(name, tmp_path, {"seed": 0, "a.b": [1]})  # type: ignore[arg-type]
    tracker.scalars({"reward": 1.5, "words": "no"}, 3)
    tracker.end(tmp_path, {"iterations": 3, "reward_tuned": 2.0})
    assert configured == {"seed": 0, "a.b": "[1]"}
    picture: Any = [(4, 6, 3)] if name == "wandb" else (4, 6, 3)
    assert logged == [
        {"step": 3, "reward": 1.5},
        {"step": 3, "summary/iterations": 3, "summary/reward_tuned": 2.0},
        {"step": 3, "after": picture},
        {"finished": True},
    ]


def test_a_tracker_that_refuses_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty)\nsee the manual")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __spec__=types.SimpleNamespace()))
    with pytest.raises(InputError, match=r"training\.report_to wandb: api_key not configured \(no-tty\)$"):
        run(recipe_for(tmp_path, report_to="wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None if module == "wandb" else types.SimpleNamespace())
    with pytest.raises(InputError, match=r"training\.report_to wandb: wandb is not installed: pip install '\.\[wandb\]'"):
        run(recipe_for(tmp_path, report_to="wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"training\.report_to"):
        recipe_for(tmp_path, report_to="tensorbord")
