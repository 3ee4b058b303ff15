"""Names and paths, and what works alike for image models and pipelines: to load, to sample, to train, to evaluate."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_classifier, tiny_flow, tiny_recipe
from typed import Beside, command
from typer.testing import CliRunner

import tiltflow
from tiltflow.api import evaluate
from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError, Note
from tiltflow.models.model_folder import load_classifier, model_folder
from tiltflow.runs.recipe import find_recipe, read_recipe, read_recipe_tree, shipped_recipes
from tiltflow.runs.run import run
from tiltflow.settings import read_yaml
from tiltflow.shipped import asset

# ---- names and paths ----


def test_a_folder_of_the_name_of_a_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is the shipped one, and says so; every way to write a path is the folder."""
    monkeypatch.chdir(tmp_path)
    tiny_flow(tmp_path / "digits-flow")
    with pytest.warns(
        Note, match=r"'digits-flow' is the model that ships with tiltflow; write \./digits-flow for the one in this"
    ):
        assert tiltflow.load("digits-flow").event_shape == (1, 28, 28)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in (
            "./digits-flow",
            str(tmp_path / "digits-flow"),
            Path("digits-flow"),
            Path("./digits-flow"),
            "digits-flow/",
        ):
            assert tiltflow.load(path).event_shape == (1, 8, 8), path
        assert tiltflow.load("digits-diffusion").event_shape == (1, 28, 28)
        assert model_folder("digits-flow/../digits-flow") == Path("digits-flow/../digits-flow")
        with pytest.raises(InputError, match="there is no model"):
            tiltflow.load("./digits-diffusion")
    tiny_classifier(tmp_path / "digits-judge")
    assert load_classifier("./digits-judge")[1].class_names == ("a", "b", "c")
    with pytest.warns(Note, match="'digits-judge' is the model"):
        assert len(load_classifier("digits-judge")[1].class_names) == 10


def test_a_file_of_the_name_of_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits-even").write_text("description: mine\n")
    with pytest.warns(Note, match=r"'digits-even' is the recipe that ships with tiltflow; write \./digits-even"):
        assert find_recipe("digits-even", "train") == shipped_recipes("train")["digits-even"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_recipe_tree(find_recipe("./digits-even", "train"), []) == {"description": "mine"}
        assert find_recipe("digits-ink", "train") == shipped_recipes("train")["digits-ink"]
    run_folder = tmp_path / "digits-ink"
    run_folder.mkdir()
    (run_folder / "recipe.yaml").write_text("description: of a run\n")
    assert find_recipe("./digits-ink", "train") == Path("./digits-ink/recipe.yaml")


def test_the_command_line_says_which_is_meant_in_one_line(tmp_path: Path) -> None:
    tiny_flow(tmp_path / "digits-flow")
    words = ["sample", "digits-flow", "-n", "1", "--num-inference-steps", "2", "-o", "x.npz", "--quiet", "--device", "cpu"]
    said = tmp_path / "said"
    assert Beside(command, *words, output=said, folder=tmp_path).wait() == 0, said.read_text()
    (line,) = said.read_text().strip().splitlines()
    assert line.startswith("'digits-flow' is the model that ships with tiltflow; write ./digits-flow for the one")
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["samples"].shape == (1, 1, 28, 28)


# ---- one way for image models and pipelines ----


def test_a_recipe_is_of_the_kind_of_its_model(tmp_path: Path) -> None:
    for name in ("digits-even", "tiles-colour"):
        recipe = read_recipe(read_yaml(shipped_recipes("train")[name]), name)
        assert (recipe.prompts is not None) == (name == "tiles-colour")
    summary = run(read_recipe(read_yaml(tiny_recipe(tmp_path)), "tiny"), tmp_path / "run")
    assert evaluate(tmp_path / "run", num_samples=16)["num_samples"] == 16
    assert summary["num_samples"] == 32


def test_what_a_pixel_model_cannot_be_asked_for(tmp_path: Path) -> None:
    folder = str(tiny_flow(tmp_path / "flow"))
    for option in (["--prompt", "a cat"], ["--guidance-scale", "2"]):
        result = CliRunner().invoke(app, ["sample", folder, *option, "-o", str(tmp_path / "x.png")])
        assert isinstance(result.exception, InputError)
        assert str(result.exception).startswith(f"{option[0]}: {folder} is not a text-to-image pipeline")
    result = CliRunner().invoke(
        app, ["sample", folder, "--batch-size", "3", "-n", "4", "-o", str(tmp_path / "x.npz"), "--json"]
    )
    assert json.loads(result.stdout.splitlines()[-1])["num_samples"] == 4
    x = np.load(tmp_path / "x.npz")["samples"]
    assert torch.equal(torch.from_numpy(x), tiltflow.load(folder).sample(4, batch_size=3))  # type: ignore[arg-type]


def test_pipelines_load_by_name_and_from_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from tiltflow.models.text_to_image import TextToImage

    model = tiltflow.load("tiles-pipeline")
    assert isinstance(model, TextToImage)
    assert model.pipeline.text_encoder.dtype == torch.float32  # as in a recipe, whatever the file
    with pytest.raises(InputError, match=r"in a recipe write `model: \{diffusers: tiles-pipeline\}`"):
        model_folder("tiles-pipeline")
    images = model.sample(["potion on a red background"], sampling=tiltflow.Sampling(solver="euler", num_inference_steps=2))
    assert images.shape == (1, 3, 32, 32)
    shipped = asset("tiles-pipeline", "pipeline", "model_index.json")
    assert shipped is not None
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shipped, "tiles-pipeline")
    (tmp_path / "tiles-pipeline" / "unet" / "config.json").unlink()
    with pytest.raises(InputError, match=r"tiles-pipeline/unet: has weights, but no config\.json"):
        tiltflow.load("./tiles-pipeline")
    with pytest.raises(InputError, match=r"tiles-pipeline/unet: has weights, but no config\.json"):
        tiltflow.from_diffusers("./tiles-pipeline")
    with pytest.warns(Note, match="'tiles-pipeline' is the pipeline that ships"):
        tiltflow.from_diffusers("tiles-pipeline")
