"""Every kind of model can do what any other can: two toy kinds, networks on tensors, and pipelines."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import ATOMS, SPACE, VARIANCE, Ragged, Video, projected
from safetensors.torch import load_file
from tiny import tiny_classifier, tiny_recipe
from torch import Tensor

import tiltflow
from tiltflow import plugins
from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.evaluation.monitor import read_looks
from tiltflow.models.model_folder import ClassifierConfig, save_model
from tiltflow.models.protocol import GenerativeModel
from tiltflow.networks.residual_classifier import ResidualClassifier
from tiltflow.runs.doctor import examine
from tiltflow.runs.export import export_run
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import evaluate_run, run
from tiltflow.runs.run_files import read_records
from tiltflow.runs.sweep import sweep
from tiltflow.settings import apply_overrides, read_yaml, validate
from tiltflow.streams import new_network

BETA = 0.5
SLOPE = torch.linspace(-1, 1, ATOMS * SPACE).reshape(ATOMS, SPACE)
FAST = tiltflow.Optimizer(learning_rate=3e-2, lr_warmup_steps=0, max_grad_norm=None)
METHODS: dict[str, tuple[Any, dict[str, int]]] = {
    "adjoint-matching": (
        tiltflow.AdjointMatching(beta=BETA, num_inference_steps=20),
        {"max_train_steps": 100, "train_batch_size": 8},
    ),
    "score-as-action": (
        tiltflow.ScoreAsAction(beta=BETA, estimator="return", num_inference_steps=20),
        {"max_train_steps": 150, "train_batch_size": 512},
    ),
    "orw-cfm-w2": (
        tiltflow.OrwCfmW2(tau=1.0, alpha=BETA, weight_mode="both-terms", num_inference_steps=10),
        {"max_train_steps": 250, "train_batch_size": 4096},
    ),
    "tilt-matching": (
        tiltflow.TiltMatching(beta=BETA, num_inference_steps=10, num_passes=50),
        {"max_train_steps": 250, "train_batch_size": 4096},
    ),
}


def along(x: Tensor) -> Tensor:
    return (x * SLOPE).flatten(1).sum(1)


@pytest.mark.parametrize(
    "name", ["adjoint-matching", *(pytest.param(each, marks=pytest.mark.slow) for each in list(METHODS)[1:])]
)
def test_ragged_clouds_reach_the_tilt_of_their_size(name: str) -> None:
    """N(0, s^2 P) tilted by exp(a x / beta) is N(s^2 P a / beta, s^2 P): of each size, in the range of P alone."""
    method, training = METHODS[name]
    tuned = tiltflow.tune(Ragged.make(), along, method, tiltflow.Training(**training), optimizer=FAST)
    for label, size in enumerate((2, 3)):
        mask = (torch.arange(ATOMS) < size).float()[None, :, None]
        items = [Item("", {"label": label})] * 4000
        x = tuned.draw(items, seed=1, batch_size=4000)
        torch.testing.assert_close(projected(x, mask.expand(4000, -1, -1)), x, rtol=0, atol=1e-5)
        expected = VARIANCE / BETA * projected(SLOPE[None], mask)[0]
        free = (size - 1) * SPACE
        assert (x.mean(0) - expected).abs().max() < 4 * (VARIANCE / 4000) ** 0.5 + 0.02
        # a variance of n k normal numbers has the relative error sqrt(2 / (n k)); the chain of 60 steps adds 2 %
        variance = (x - x.mean(0)).square().sum() / (4000 * free)
        assert abs(variance / VARIANCE - 1) < 4 * (2 / (4000 * free)) ** 0.5 + 0.03


def loud(videos: Tensor) -> Tensor:
    return videos.mean((1, 2, 3, 4))


KINDS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "ragged": (Ragged.make, along, {"train_batch_size": 16}, {"num_samples": 32}),
    "video": (
        Video.make,
        loud,
        {"prompts_per_step": 2, "num_generations": 4, "guidance_mode": "rollout"},
        {"num_prompts": 2, "num_generations": 4},
    ),
}
SHORT: dict[str, Any] = {
    "adjoint-matching": tiltflow.AdjointMatching(num_inference_steps=4),
    "score-as-action": tiltflow.ScoreAsAction(preset="ddpo", num_inference_steps=4),
    "orw-cfm-w2": tiltflow.OrwCfmW2(num_inference_steps=4, min_effective_sample_size=1, num_passes=1),
    "tilt-matching": tiltflow.TiltMatching(num_inference_steps=4, min_effective_sample_size=1, num_passes=1),
    "path-reweighted": tiltflow.PathReweighted(
        num_inference_steps=4,
        path_steps=4,
        first=tiltflow.AdjointMatching(num_inference_steps=4),
        min_effective_sample_size=1,
        num_passes=1,
    ),
    "draft": tiltflow.Draft(num_inference_steps=4, truncation="random"),
    "refl": tiltflow.Refl(num_inference_steps=4, earliest=0.5),
    "endpoint-adjoint-matching": tiltflow.EndpointAdjointMatching(num_inference_steps=4, num_passes=1),
}


def tuned_into(folder: Path, kind: str, method: str, **settings: Any) -> Any:
    make, reward, sizes, measured = KINDS[kind]
    training = tiltflow.Training(**{**sizes, "max_train_steps": 4, "monitor": {"steps": 2, "num_samples": 16}} | settings)
    conditions = ["a wave", "a flame"] if make().prompted else None
    evaluation = tiltflow.Evaluation(
        **measured, points=[{"num_inference_steps": 4}, {"solver": "memoryless", "num_inference_steps": 4}]
    )
    return tiltflow.tune(
        make(), reward, SHORT[method], training, optimizer=FAST, conditions=conditions, evaluation=evaluation, output=folder
    )


QUICK = ("ragged-adjoint-matching", "ragged-orw-cfm-w2", "video-adjoint-matching", "video-score-as-action")


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        pytest.param(kind, method, marks=() if f"{kind}-{method}" in QUICK else pytest.mark.slow)
        for kind in KINDS
        for method in SHORT
    ],
)
def test_a_kind_of_ones_own_goes_through_everything(kind: str, method: str, tmp_path: Path) -> None:
    """The loop, micro-batches, the average, the monitor, checkpoints, resume bit for bit, the evaluation and its report."""
    assert isinstance(KINDS[kind][0](), GenerativeModel)
    whole = tuned_into(tmp_path / "whole", kind, method, ema_decay=0.5, micro_batch_size=4)
    tuned_into(tmp_path / "parts", kind, method, ema_decay=0.5, micro_batch_size=4, max_train_steps=4, checkpointing_steps=2)
    for later in (tmp_path / "parts" / "checkpoints").glob("step-*4"):
        (later / "manifest.json").unlink()  # as if it had been cut off
    settings = {"ema_decay": 0.5, "micro_batch_size": 4, "checkpointing_steps": 2, "resume_from_checkpoint": "latest"}
    tuned_into(tmp_path / "parts", kind, method, **settings)
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(first[key], value) for key, value in whole.flow.network.state_dict().items())
    assert [look["step"] for look in read_looks(tmp_path / "whole")] == [0, 2, 4]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert [row["model"] for row in summary["table"]] == ["base", "tuned"] * 2
    assert summary["path_kl"] > 0
    assert method in ("draft", "refl") or summary["achieved_tilt_error"] > 0  # which ask for none
    assert (tmp_path / "whole" / "report.html").exists()
    assert len(read_records(tmp_path / "parts")) == 4


# ---- what only pipelines could do, of networks ----

FUNCTIONS = """
import torch

def bright(images):
    return images.mean((1, 2, 3))

def dark(images):
    return -images.mean((1, 2, 3))

def spread(x):
    return x.square().sum((1, 2))

def moments(images):
    return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3)), images[:, 0, 0, 0]], 1)

def of_class(x, labels):
    return 3 * x.sum(1) * (1 - 2 * labels) + 7 * labels
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with functions of the user's, from which they are imported."""
    (tmp_path / "mine_of_kinds.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def function(name: str) -> dict[str, str]:
    return {"name": "function", "path": f"mine_of_kinds:{name}"}


def test_a_recipe_trains_a_kind_of_ones_own(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by an entry point: trained, watched, measured, measured again from its folder, loaded, and exported."""
    entry = EntryPoint("ragged-clouds", "ragged_clouds", "tiltflow.models.sources")
    monkeypatch.setattr(plugins, "entries", lambda package: {entry.name: entry} if package == "models.sources" else {})
    tree = {
        "model": {"name": "ragged-clouds", "shift": 0.5},
        "reward": function("spread"),
        "method": {"name": "adjoint-matching", "num_inference_steps": 4},
        "training": {"max_train_steps": 2, "train_batch_size": 8, "classes": [1], "monitor": {"steps": 1, "num_samples": 8}},
        "evaluation": {"num_samples": 32, "points": [{"num_inference_steps": 4}]},
    }
    recipe = validate(Recipe, tree, "recipe")
    assert list(examine(recipe))[-1].level in ("green", "amber")
    summary = run(recipe, mine / "run")
    assert (summary["model"], summary["num_samples"]) == ("clouds", 32)
    assert evaluate_run(mine / "run")["reward_tuned"] == summary["reward_tuned"]
    tuned = tiltflow.load(mine / "run")
    assert isinstance(tuned, Ragged)
    assert tuned.sampling == recipe.evaluation.first.sampling
    assert export_run(mine / "run", mine / "out")["kind"] == "network"
    with pytest.raises(InputError, match="there is no source 'ragged-cloud', did you mean 'ragged-clouds'"):
        validate(Recipe, tree | {"model": {"name": "ragged-cloud"}}, "recipe")


def of_network(folder: Path, *overrides: str, **changes: Any) -> Recipe:
    return validate(Recipe, apply_overrides(read_yaml(tiny_recipe(folder, **changes)), overrides), "recipe")


def test_a_network_is_measured_as_a_pipeline_is(mine: Path) -> None:
    """Several ways to sample, held-out rewards, features with a reference, diversity, the gain sample by sample."""
    points = [{"solver": "memoryless", "num_inference_steps": 4}, {"solver": "heun", "num_inference_steps": 3}]
    evaluation = {
        "num_samples": 64, "batch_size": 64, "points": points, "rewards": [function("dark")],
        "features": "mine_of_kinds:moments", "reference": "base", "grid": 4,
    }  # fmt: skip
    recipe = of_network(mine, reward=function("bright"), evaluation=evaluation, sampling=None)
    summary = run(recipe, mine / "run")
    rows = summary["table"]
    assert [(row["model"], row["solver"]) for row in rows] == [
        ("base", "memoryless"), ("tuned", "memoryless"), ("base", "heun"), ("tuned", "heun"),
    ]  # fmt: skip
    for row in rows:
        assert row["function"] == pytest.approx(-row["function 2"])
        assert row["fid"] >= 0
        assert {"kid", "vendi", "variance", "variance_error"} <= row.keys()
        assert "guidance_scale" not in row
    assert summary["reward_base"] == pytest.approx(rows[0]["function"])
    assert summary["reward_gain"] == pytest.approx(summary["reward_tuned"] - summary["reward_base"])
    assert summary["w2_space"] == "features of mine_of_kinds:moments"
    assert evaluate_run(mine / "run")["table"] == rows


def test_a_network_may_get_a_lora(tmp_path: Path) -> None:
    """Only the adapter learns; what is saved is one network, with it merged in, and the base is what it was."""
    path = tiny_recipe(tmp_path)
    model = {"path": str(tmp_path / "flow"), "adapter": {"rank": 2}}
    recipe = validate(Recipe, read_yaml(path) | {"model": model}, "recipe")
    summary = run(recipe, tmp_path / "run")
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "flow", tmp_path / "run" / "model"))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all(before[key].ndim > 1 for key in changed)  # matrices and kernels: no bias, no norm
    update = next(after[key] - before[key] for key in changed if before[key].ndim == 2)
    assert torch.linalg.matrix_rank(update, atol=1e-6) <= 2
    again = evaluate_run(tmp_path / "run")  # from the folder: the base, and the merged network
    assert again["reward_base"] == summary["reward_base"]
    assert again["reward_tuned"] == pytest.approx(summary["reward_tuned"], abs=1e-4)
    with pytest.raises(InputError, match="with an adapter only the adapter is trained"):
        run(validate(Recipe, read_yaml(path) | {"model": model, "training": {"trainable": "leave"}}, "recipe"), tmp_path / "no")


class OfClass(torch.nn.Module):
    """A small velocity field of each class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = torch.nn.Linear(4, 2)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = self.network(torch.cat([x, t[:, None], labels[:, None].to(x)], 1)) - x
        return found


def test_each_class_is_tilted_as_hard_as_any_other() -> None:
    """(r - mean) / std of the class: a constant and a scale of the reward of each class leave the run as it is."""

    def plain(x: Tensor, labels: Tensor) -> Tensor:
        return x.sum(1) * (1 - 2 * labels)

    def moved(x: Tensor, labels: Tensor) -> Tensor:
        return 5 * plain(x, labels) + 7 * labels

    found = []
    for reward, count in ((plain, 256), (moved, 256), (moved, None)):
        model = tiltflow.Model(tiltflow.Flow(OfClass()), (2,), class_names=("a", "b"))
        training = tiltflow.Training(max_train_steps=2, train_batch_size=16, per_prompt_normalization=count)
        tuned = tiltflow.tune(model, reward, tiltflow.AdjointMatching(num_inference_steps=4), training, optimizer=FAST)
        found.append(torch.cat([p.detach().flatten() for p in tuned.flow.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-3)
    assert (found[1] - found[2]).abs().max() > 1e-2


def test_the_tuned_network_of_a_run_is_exported(tmp_path: Path) -> None:
    run(of_network(tmp_path), tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "out") == {"output": str(tmp_path / "out"), "kind": "network", "url": None}
    assert torch.equal(tiltflow.load(tmp_path / "out").sample(2), tiltflow.load(tmp_path / "run").sample(2))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "model = tiltflow.load" in card
    assert "![Pictures of the base](before.png)" in card
    assert "license" not in card.split("---")[1]


# ---- what only networks could do, of pipelines ----


def of_pipeline(folder: Path, **changes: Any) -> dict[str, Any]:
    pytest.importorskip("diffusers")
    from test_run_text_to_image import recipe_for

    tree = recipe_for(folder, "stable-diffusion", **changes)
    tree["training"] |= {"max_train_steps": 2}
    return tree


def judge_of_pictures(folder: Path) -> str:
    settings = ResidualClassifier(channels=(8, 8), classes=3, image_channels=3)
    save_model(folder, ClassifierConfig(network=settings, class_names=("a", "b", "c")), new_network(settings, 2), "")
    return str(folder)


def test_a_pipeline_has_a_judge(tmp_path: Path) -> None:
    """Class histograms, features and their distance to the base, tests over prompts, and what the monitor looks at."""
    evaluation = {
        "num_prompts": 2, "num_generations": 56, "batch_size": 112, "points": [{"num_inference_steps": 2}],
        "judge": judge_of_pictures(tmp_path / "judge"), "group": [0, 2],
    }  # fmt: skip
    tree = of_pipeline(tmp_path, evaluation=evaluation)
    tree["prompts"] = {"texts": ["a red cat", "a blue dog", "a green hat", "a red hat"], "validation": 0.5}
    tree["training"] |= {"monitor": {"steps": 1}}
    summary = run(validate(Recipe, tree, "recipe"), tmp_path / "run")
    judge = summary["judge"]
    assert sum(judge["base"]) == pytest.approx(1)
    assert summary["w2_space"] == f"features of {evaluation['judge']}"
    assert summary["w2_floor"] > 0
    assert summary["target_unknown"] is None
    assert sum(judge["target"]) == pytest.approx(1)
    assert "total variation of the classes" in {row["statistic"] for row in summary["tests"]}
    looks = read_looks(tmp_path / "run")
    of_judge = {"the judge's group", "the judge's confidence", "the entropy of the judge's classes"}
    assert set(looks[0]["measures"]) == {"reward", "variety", "edge energy", "colour entropy", *of_judge}
    assert "classes" in (tmp_path / "run" / "report.html").read_text()
    small = judge | {"judge": str(tiny_classifier(tmp_path / "other"))}
    tree["evaluation"] = evaluation | {"judge": small["judge"]}
    with pytest.raises(InputError, match=r"evaluation\.judge does not take samples of shape"):
        run(validate(Recipe, tree, "recipe"), tmp_path / "no")


def test_a_pipeline_says_how_near_it_is_to_a_law_of_its_own(tmp_path: Path) -> None:
    """The balance of ORW-CFM-W2, on latents of its own sampler; not where they are guided."""
    for mode in ("none", "rollout"):
        tree = of_pipeline(tmp_path, method="orw-cfm-w2")
        tree["training"] |= {"guidance_mode": mode}
        summary = run(validate(Recipe, tree, "recipe"), tmp_path / mode)
        assert ("own_law_balance" in summary) is (mode == "none")
        assert summary["achieved_tilt_samples"] == summary["num_samples"]


@pytest.mark.slow
def test_a_sweep_of_a_pipeline(tmp_path: Path) -> None:
    found = sweep(of_pipeline(tmp_path), {"method.beta": [0.5, 2.0]}, tmp_path / "sweep")
    assert [row["beta"] for row in found["points"]] == [0.5, 2.0]
    assert found["distance"] == "path_kl"
    assert (tmp_path / "sweep" / "pareto.svg").exists()
