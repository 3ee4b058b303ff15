"""What a run was made from, by content: names that mean something else now are refused, and paths mean the same everywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from test_resume import NO_JUDGE, Killed, killed_after, resuming, same_runs
from tiny import UNET, tiny_classifier, tiny_flow, tiny_recipe
from typer.testing import CliRunner

from tiltflow import accept_changes
from tiltflow.api import evaluate
from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError, Note
from tiltflow.plugins import find, names
from tiltflow.runs import fingerprints
from tiltflow.runs.checkpoint import FOLDER, checkpoints, load_checkpoint, save_checkpoint
from tiltflow.runs.fingerprints import FILE, absolute, digest, externals, module_file, of_network, read_fingerprints
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.settings import External, Settings, read_yaml, validate
from tiltflow.streams import new_network

TRAINING = {"max_train_steps": 4, "train_batch_size": 4, "checkpointing_steps": 2}


def other_weights(folder: Path) -> None:
    """The same network with other weights."""
    path = folder / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path)


# ---- what is known of a file or folder ----


def test_a_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    flow = tiny_flow(tmp_path / "flow")
    first = digest(flow)
    shutil.copytree(flow, tmp_path / "elsewhere")
    assert digest(tmp_path / "elsewhere") == first
    (flow / "README.md").write_text("another card")
    (flow / "notes.txt").write_text("not loaded")
    assert digest(flow) == first
    other_weights(flow)
    assert digest(flow) != first

    pipe = tmp_path / "pipe"
    (pipe / "unet").mkdir(parents=True)
    (pipe / "model_index.json").write_text("{}")
    (pipe / "unet" / "config.json").write_text("{}")
    first = digest(pipe)
    (pipe / "README.md").write_text("")
    (pipe / ".cache").mkdir()
    (pipe / ".cache" / "x").write_text("")
    assert digest(pipe) == first
    (pipe / "unet" / "config.json").rename(pipe / "unet" / "other.json")
    assert digest(pipe) != first  # a name is content too


def test_the_base_of_an_adapter_is_the_same_before_and_after_it() -> None:
    peft = pytest.importorskip("peft")
    network = new_network(UNET, 0)
    first = of_network(network)
    assert of_network(new_network(UNET, 0)) == first != of_network(new_network(UNET, 1))
    adapted = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["modulation"], r=2), network)
    adapted.disable_adapter = None
    before = of_network(adapted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    assert of_network(adapted) == before == first


def test_a_file_is_hashed_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    path, count = tmp_path / "weights", 0
    file_digest = hashlib.file_digest

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return file_digest(*arguments)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    path.write_bytes(b"a")
    first = digest(path)
    assert (digest(path), count) == (first, 1)
    path.write_bytes(b"bc")
    assert digest(path) != first
    assert count == 2


def test_a_module_is_found_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("raise AssertionError('was run')")
    (tmp_path / "package" / "module.py").write_text("raise AssertionError('was run')")
    monkeypatch.chdir(tmp_path)
    assert module_file("package.module") == tmp_path / "package" / "module.py"
    assert module_file("package") == tmp_path / "package" / "__init__.py"
    assert module_file("package.none") is None
    assert module_file("none.at.all") is None


def test_a_name_on_the_hub_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0" * 40)
    (refs / "v2").write_text("1" * 40)
    of = fingerprints.fingerprint
    assert of("some/model", External()) == f"commit:{'0' * 40}"
    assert of("some/model", External(), "v2") == f"commit:{'1' * 40}"
    assert of("some/model", External(), "a" * 40) == f"commit:{'a' * 40}"
    assert of("some/other", External()) is None
    assert of("heun", External(only_functions=True)) is None


PACKAGES = ("rewards", "methods", "networks", "conditions", "models.sources")


def test_every_setting_that_names_something_says_so() -> None:
    """By hand: those that are paths, names of models or functions. A new text is to be put into one list or the other."""
    named = {
        "Recipe": {"model"},
        "Evaluation": {"judge", "data", "features", "reference"},
        "Network": {"path"},
        "Policy": {"path"},
        "Observations": {"data"},
        "Sampling": {"solver"},
        "Adapter": {"continue_from"},
        "Diffusers": {"components", "diffusers"},
        "Lora": {"path"},
        "Prompts": {"path", "dataset", "validation"},
        "Source": {"path", "dataset"},
        "Point": {"solver"},
        "OrwCfmW2": {"weight", "data", "solver"},
        "Ddpo": {"solver"},
        "Dpok": {"solver"},
        "Draft": {"solver"},
        "FlowGrpo": {"solver"},
        "EndpointAdjointMatching": {"solver"},
        "PathReweighted": {"solver"},
        **{key: {"solver"} for key in ("TiltMatching", "Ram", "Awm", "Adrpo", "DiffusionNft", "Rwr", "Raft")},
        "DiffusionDpo": {"solver", "data"},
        "Dxmi": {"solver"},
        "Refl": {"solver"},
        "ScoreAsAction": {"solver"},
        "AdjointMatching": {"solver"},
        "Critic": {"form"},
        "Aesthetic": {"model", "head"},
        "ClassLogOdds": {"classifier"},
        "ClassProbability": {"classifier"},
        "ClipScore": {"model"},
        "Energy": {"data"},
        "QFunction": {"data"},
        "Online": {"environment"},
        "Factory": {"path"},
        "Function": {"path"},
        "Hps": {"model", "tokenizer"},
        "ImageReward": {"model", "tokenizer"},
        "ImageSimilarity": {"model"},
        "PickScore": {"model", "tokenizer"},
        "Preference": {"votes", "clip", "classifier"},
    }
    words = {
        "description", "name", "column", "revision", "variant", "resume_from_checkpoint", "url", "token_variable", "texts",
        "subset", "split", "colour", "scheduler", "target_modules", "trainable", "negative_prompt", "without", "arguments",
        "dtype", "attention_backend", "quantization", "image_column", "classes",
    }  # fmt: skip
    seen: dict[str, set[str]] = {}
    todo: list[type[Settings]] = [Recipe]
    todo += [find(package, name) for package in PACKAGES for name in names(package)]
    done: set[type[Settings]] = set()
    unknown = set()
    while todo:
        kind = todo.pop()
        if kind in done:
            continue
        done.add(kind)
        for name, field in kind.model_fields.items():
            todo += settings_in(field.annotation)
            if fingerprints._marker(field) is not None:
                seen.setdefault(kind.__name__, set()).add(name)
            elif name not in words and takes_text(field.annotation):
                unknown.add(f"{kind.__name__}.{name}")
    assert unknown == set()
    assert seen == named


def settings_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in settings_in(part)]


def takes_text(annotation: Any) -> bool:
    return annotation is str or (
        annotation is not Any and not is_literal(annotation) and any(map(takes_text, getattr(annotation, "__args__", ())))
    )


def is_literal(annotation: Any) -> bool:
    return "Literal" in str(getattr(annotation, "__origin__", ""))


# ---- paths ----


def test_paths_in_a_run_are_absolute_and_words_stay_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_flow(tmp_path / "flow")
    tiny_classifier(tmp_path / "judge", 2)
    for word in ("heun", "digits-classifier", "base"):
        (tmp_path / word).mkdir()
    (tmp_path / "rewards.py").write_text("def ink(x):\n    return x.mean((1, 2, 3))\n")
    monkeypatch.chdir(tmp_path)
    tree = {
        "model": "flow",
        "reward": {
            "name": "sum",
            "rewards": [
                {"reward": {"name": "function", "path": "rewards:ink"}},
                {"reward": {"name": "class-log-odds", "classifier": "./judge", "classes": [1]}},
                {"reward": {"name": "class-log-odds", "classifier": "digits-classifier", "classes": [1]}},
            ],
        },
        "method": {"name": "orw-cfm-w2", "solver": "heun"},
        "evaluation": {"judge": "judge"},
    }
    recipe = absolute(validate(Recipe, tree, "recipe"))
    assert recipe.model == str(tmp_path / "flow")
    terms = [term.reward for term in recipe.reward.rewards]
    assert terms[0].path == "rewards:ink"
    assert terms[1].classifier == str(tmp_path / "judge")
    assert terms[2].classifier == "digits-classifier"
    assert recipe.method.solver == "heun"
    assert recipe.evaluation.judge == str(tmp_path / "judge")
    assert absolute(recipe) is recipe
    keys = {fingerprints.dotted(path) for path, _, _ in externals(recipe)}
    assert {"model", "reward.rewards.0.reward.path", "reward.rewards.1.reward.classifier", "evaluation.judge"} <= keys
    found = fingerprints.fingerprints(recipe)
    assert {"model", "reward.rewards.0.reward.path", "reward.rewards.2.reward.classifier"} <= found.keys()
    assert not any(key.startswith("evaluation") or key.endswith("solver") for key in found)


def test_a_run_is_the_same_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another model has the name that the recipe says."""
    home, away = tmp_path / "home", tmp_path / "away"
    away.mkdir()
    path = tiny_recipe(home, training=TRAINING, evaluation=NO_JUDGE, model="flow")
    other_weights(tiny_flow(away / "flow"))
    monkeypatch.chdir(home)
    recipe = validate(Recipe, read_yaml(path), "recipe")
    with pytest.raises(Killed):
        run(recipe, home / "run", callbacks=[killed_after(3)])
    assert read_yaml(home / "run" / "recipe.yaml")["model"] == str(home / "flow")
    shutil.copytree(home / "run", tmp_path / "copy")
    monkeypatch.chdir(away)
    with pytest.raises(InputError, match=r"started with another recipe: model '.*home/flow' -> '.*away/flow'"):
        run(resuming(recipe), tmp_path / "copy")
    monkeypatch.chdir(home)
    run(resuming(recipe), tmp_path / "copy")


# ---- what has changed ----


def recipe_of_all(folder: Path) -> Recipe:
    """A base, a reward of code and one of weights, and data of the method."""
    (folder / "looked_at.py").write_text("def ink(x):\n    return x.mean((1, 2, 3))\n")
    np.savez(folder / "data.npz", x_train=np.zeros((8, 8, 8), np.uint8))
    classifier = tiny_classifier(folder / "classifier")
    path = tiny_recipe(
        folder,
        training=TRAINING,
        evaluation=NO_JUDGE,
        reward={
            "name": "sum",
            "rewards": [
                {"reward": {"name": "function", "path": "looked_at:ink"}},
                {"reward": {"name": "class-log-odds", "classifier": str(classifier), "classes": [0]}},
            ],
        },
        method={
            "name": "orw-cfm-w2", "num_inference_steps": 2, "min_effective_sample_size": 1,
            "online_fraction": 0.5, "data": str(folder / "data.npz"),
        },
        optimizer={"lr_scheduler": "constant"},
    )  # fmt: skip
    return validate(Recipe, read_yaml(path), "recipe")


CHANGES: dict[str, Callable[[Path], object]] = {
    "model": lambda folder: other_weights(folder / "flow"),
    "reward.rewards.0.reward.path": lambda folder: (folder / "looked_at.py").write_text(
        "def ink(x):\n    return -x.mean((1, 2, 3))\n"
    ),
    "reward.rewards.1.reward.classifier": lambda folder: other_weights(folder / "classifier"),
    "method.data": lambda folder: np.savez(folder / "data.npz", x_train=np.ones((8, 8, 8), np.uint8)),
}


@pytest.mark.usefixtures("unmeasured")
def test_a_run_whose_sources_have_changed_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    recipe = recipe_of_all(tmp_path)
    run(recipe, tmp_path / "run")
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_train_steps": 6})})
    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for what, change in CHANGES.items():
        folder = tmp_path / f"changed {what}"
        shutil.copytree(tmp_path / "run", folder)
        before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        kept = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("flow", "classifier")}
        change(tmp_path)
        with pytest.raises(InputError) as error:
            run(resuming(longer), folder)
        assert str(error.value) == (
            f"{folder}: what {what} names has changed since the run was started; restore it, or accept the change:"
            " --accept-changes"
        )
        assert {path: (folder / path.relative_to(tmp_path / "run")).read_bytes() for path in written} == written
        for path, content in before.items():
            path.write_bytes(content)
        for name, content in kept.items():
            (tmp_path / name / "model.safetensors").write_bytes(content)
    notes: list[str] = []
    run(resuming(longer), tmp_path / "run", note=notes.append)  # put back, it goes on
    assert not any("names is not" in note for note in notes)


@pytest.mark.usefixtures("unmeasured")
def test_a_change_that_is_accepted_is_said_and_written_down(tmp_path: Path) -> None:
    path = tiny_recipe(tmp_path, training=TRAINING, evaluation=NO_JUDGE)
    recipe = validate(Recipe, read_yaml(path), "recipe")
    with pytest.raises(Killed):
        run(recipe, tmp_path / "run", callbacks=[killed_after(3)])
    other_weights(tmp_path / "classifier")
    notes: list[str] = []
    with accept_changes():
        run(resuming(recipe), tmp_path / "run", note=notes.append)
    said = "accepted: what reward.classifier names has changed since the run was started"
    assert notes.count(said) == 1
    now = f"sha256:{digest(tmp_path / 'classifier')}"
    assert read_fingerprints(tmp_path / "run")["reward.classifier"] == now  # type: ignore[index]
    assert load_checkpoint(checkpoints(tmp_path / "run" / FOLDER)[-1])["fingerprints"]["reward.classifier"] == now
    run(resuming(recipe), tmp_path / "run")  # from now on that is what it is


@pytest.mark.usefixtures("unmeasured")
def test_what_was_moved_is_the_same(tmp_path: Path) -> None:
    path = tiny_recipe(tmp_path, training=TRAINING, evaluation=NO_JUDGE)
    tree = read_yaml(path)
    recipe = validate(Recipe, tree, "recipe")
    run(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        run(recipe, tmp_path / "run", callbacks=[killed_after(3)])
    (tmp_path / "flow").rename(tmp_path / "moved")
    moved = validate(Recipe, tree | {"model": str(tmp_path / "moved")}, "recipe")
    run(resuming(moved), tmp_path / "run")
    same_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.usefixtures("unmeasured")
def test_a_run_without_fingerprints_goes_on_with_a_note(tmp_path: Path) -> None:
    """As one that an earlier version began."""
    path = tiny_recipe(tmp_path, training=TRAINING, evaluation=NO_JUDGE)
    recipe, notes = validate(Recipe, read_yaml(path), "recipe"), list[str]()
    run(recipe, tmp_path / "run")
    (tmp_path / "run" / FILE).unlink()
    last = checkpoints(tmp_path / "run" / FOLDER)[-1]
    saved = load_checkpoint(last)
    del saved["fingerprints"]
    save_checkpoint(last.parent, 4, saved)
    run(resuming(recipe), tmp_path / "run", note=notes.append)
    assert "the run has no fingerprints: changes of base, prompts and reward cannot be detected" in notes
    assert read_fingerprints(tmp_path / "run")


def test_what_is_evaluated_again_is_what_was_trained(tmp_path: Path) -> None:
    """The base lies in the run; the reward's weights do not."""
    recipe = validate(Recipe, read_yaml(tiny_recipe(tmp_path, training=TRAINING, evaluation=NO_JUDGE)), "recipe")
    run(recipe, tmp_path / "run")
    other_weights(tmp_path / "flow")
    summary = evaluate(tmp_path / "run")  # by its own copy of the base
    before = (tmp_path / "run" / "summary.json").read_bytes()
    other_weights(tmp_path / "classifier")
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run")])
    assert isinstance(result.exception, InputError)
    assert "what reward.classifier names has changed" in str(result.exception)
    assert (tmp_path / "run" / "summary.json").read_bytes() == before
    with pytest.warns(Note, match=r"accepted: what reward\.classifier names"):
        result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), "--accept-changes"], catch_exceptions=False)
    assert result.exit_code == 0
    other_weights(tmp_path / "run" / "base")
    with pytest.raises(InputError, match=r"what model, reward\.classifier name has changed"):
        evaluate(tmp_path / "run")
    assert summary["iterations"] == 4


def test_damaged_fingerprints_are_none_and_that_is_said(tmp_path: Path) -> None:
    for content in ("", "[]", "{", "\0" * 50):
        (tmp_path / FILE).write_text(content)
        with pytest.warns(Note, match=r"fingerprints.json: (cannot be read|must be a mapping)"):
            assert read_fingerprints(tmp_path) is None
    assert read_fingerprints(tmp_path / "none") is None
