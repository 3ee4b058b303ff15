"""The section `optimizer` of a recipe: it has the method's own defaults, and earlier versions had it in `method`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_recipe
from typer.testing import CliRunner

import tiltflow
from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError, SettingsError
from tiltflow.methods.adjoint_matching import OPTIMIZERS as ADJOINT_MATCHING
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.score_as_action import OPTIMIZERS as SCORE_AS_ACTION
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.plugins import find, names
from tiltflow.runs.recipe import read_recipe_tree
from tiltflow.runs.run import Recipe, evaluate_run, run
from tiltflow.runs.sweep import points_of
from tiltflow.settings import apply_overrides, dump_yaml, read_yaml, validate
from tiltflow.training.optimizer import Optimizer, fill_optimizer, move_old_keys

DEFAULTS = {
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "lr_warmup_from_zero": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_weight_decay": 0.0,
    "max_grad_norm": 1.0,
}
SAID = "method.learning_rate is optimizer.learning_rate now"


def recipe(folder: Path, *overrides: str, **changes: Any) -> Recipe:
    tree = read_yaml(tiny_recipe(folder, **changes))
    return validate(Recipe, apply_overrides(tree, overrides), "recipe")


def test_the_defaults() -> None:
    assert tiltflow.Optimizer is Optimizer
    assert Optimizer().model_dump() == DEFAULTS
    for method in (find("methods", name)() for name in names("methods")):
        assert fill_optimizer(method).model_dump() == DEFAULTS | method.optimizer_defaults
    assert tiltflow.OrwCfmW2().optimizer_defaults == {}


@pytest.mark.parametrize(
    ("method", "own"),
    [
        (AdjointMatching(preset="paper"), ADJOINT_MATCHING["paper"]),
        (AdjointMatching(preset="official-code"), ADJOINT_MATCHING["official-code"]),
        (ScoreAsAction(preset="ddpo"), SCORE_AS_ACTION["ddpo"]),
    ],
)
def test_what_is_given_wins_then_the_preset_then_the_default(method: Any, own: dict[str, Any]) -> None:
    assert fill_optimizer(method).model_dump() == DEFAULTS | own
    given = Optimizer(learning_rate=1e-4, max_grad_norm=None)  # given, although the first is the default
    filled = fill_optimizer(method, given)
    assert filled.model_dump() == DEFAULTS | own | {"learning_rate": 1e-4, "max_grad_norm": None}
    assert fill_optimizer(AdjointMatching(preset="paper"), filled) == filled  # all of it is given now


def test_a_recipe_is_filled_in_from_its_preset(tmp_path: Path) -> None:
    method = {"name": "adjoint-matching", "preset": "paper"}
    own = recipe(tmp_path, "optimizer.adam_beta1=0.5", method=method).optimizer
    assert own.model_dump() == DEFAULTS | ADJOINT_MATCHING["paper"] | {"adam_beta1": 0.5}
    again = recipe(tmp_path, method="orw-cfm-w2", optimizer=own.model_dump()).optimizer
    assert again == own


def test_a_setting_of_the_optimizer_in_the_method_is_refused_in_one_line(tmp_path: Path) -> None:
    for key in DEFAULTS:
        with pytest.raises(InputError, match=f"^recipe: method.{key} is optimizer.{key} now$"):
            recipe(tmp_path, f"method.{key}=1")
    with pytest.raises(SettingsError, match=r"^AdjointMatching: learning_rate is optimizer\.learning_rate now$"):
        AdjointMatching(learning_rate=1e-3)
    with pytest.raises(InputError, match=f"^sweep, learning_rate=0.1: {SAID}$"):
        points_of(read_yaml(tiny_recipe(tmp_path)), {"method.learning_rate": [0.1, 0.2]}, "sweep")
    for command in (["train", str(tiny_recipe(tmp_path)), "-o", str(tmp_path / "run")], ["verify", "mixture"]):
        result = CliRunner().invoke(app, [*command, "--set", "method.learning_rate=1e-3"])
        assert isinstance(result.exception, InputError)
        assert str(result.exception).endswith(SAID)
    with pytest.raises(InputError, match=r"^tune: optimizer must be an Optimizer\(learning_rate=\.\., \.\.\), is 0\.1$"):
        tiltflow.tune(tiltflow.load("digits-flow"), lambda x: x.mean((1, 2, 3)), AdjointMatching(), optimizer=0.1)  # type: ignore[call-overload]


def old(tree: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe as earlier versions wrote it."""
    optimizer = tree.pop("optimizer")
    return tree | {"method": optimizer | tree["method"]}


def test_the_run_of_an_earlier_version_is_read_and_resumed(tmp_path: Path) -> None:
    method = {"name": "adjoint-matching", "preset": "paper", "num_inference_steps": 4, "num_passes": 1, "beta": 2.0}
    training = {"max_train_steps": 2, "train_batch_size": 4}
    settings = {"method": method | {"train_timesteps": None}, "optimizer": {"adam_beta2": 0.9}, "training": training}
    settings["evaluation"] = {"num_samples": 8, "grid": 4}
    first, folder = recipe(tmp_path, **settings), tmp_path / "run"
    summary = run(first, folder)
    written = read_yaml(folder / "recipe.yaml")
    assert written["optimizer"] == DEFAULTS | ADJOINT_MATCHING["paper"] | {"adam_beta2": 0.9}
    assert "learning_rate" not in written["method"]

    before = old(read_yaml(folder / "recipe.yaml"))
    (folder / "recipe.yaml").write_text(dump_yaml(before))
    assert move_old_keys(before) == written
    assert move_old_keys(written) is written
    assert evaluate_run(folder)["reward_tuned"] == summary["reward_tuned"]
    assert isinstance(tiltflow.load(folder), tiltflow.Model)
    assert validate(Recipe, read_recipe_tree(folder / "recipe.yaml", []), "recipe").optimizer == first.optimizer
    with pytest.raises(InputError, match=SAID):  # a run is read as it was, but what is asked for now is by the names of now
        validate(Recipe, read_recipe_tree(folder / "recipe.yaml", ["method.learning_rate=0.1"]), "recipe")

    with pytest.raises(InputError, match=r"started with another recipe: optimizer\.adam_beta2 0\.9 -> 0\.8"):
        run(recipe(tmp_path, "training.resume_from_checkpoint=latest", "optimizer.adam_beta2=0.8", **settings), folder)
    longer = ["training.resume_from_checkpoint=latest", "training.max_train_steps=3"]
    run(recipe(tmp_path, *longer, **settings), folder)  # the preset's schedule is constant
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3
    assert read_yaml(folder / "recipe.yaml")["optimizer"] == written["optimizer"]
    copied = tmp_path / "copied.yaml"
    copied.write_text(dump_yaml(before))
    with pytest.raises(InputError, match=SAID):
        validate(Recipe, read_recipe_tree(copied, []), "recipe")
