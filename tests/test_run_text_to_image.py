"""A training run of a pipeline, from recipe to exported adapter, on small random pipelines."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from tiny import iterate
from torch import Tensor

pytest.importorskip("diffusers")
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipelines import NEWER, PIPELINES, STABLE_DIFFUSION, tiny_pipeline
from tiny_scorers import tiny_aesthetic_head, tiny_clip, tiny_image_reward
from typer.testing import CliRunner

from tiltflow import accept_changes, load, load_text_to_image
from tiltflow.commands.terminal.app import app
from tiltflow.conditions import Item
from tiltflow.control.path_kl import tuned_paths
from tiltflow.errors import InputError, Interrupted, Note
from tiltflow.evaluation.estimates import effective_number
from tiltflow.evaluation.features import distances_to_reference
from tiltflow.evaluation.metrics.distance_to_reference import reference_images
from tiltflow.evaluation.metrics.diversity import diversity, squared_distance
from tiltflow.evaluation.monitor import over_groups, read_looks
from tiltflow.evaluation.samples import Asked
from tiltflow.flows.flow import Flow
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.models.from_diffusers import from_diffusers
from tiltflow.models.text_to_image import TextToImage, with_adapter
from tiltflow.rewards.function import Function
from tiltflow.rewards.functions.normalised import PerPrompt
from tiltflow.rewards.functions.prompted import given
from tiltflow.runs.export import export_run
from tiltflow.runs.recipe import Recipe, shipped_recipes
from tiltflow.runs.run import evaluate_run, load_run, read_run, run
from tiltflow.runs.run_files import read_records, write_yaml
from tiltflow.samplers.rollout import rollout
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import read_yaml, validate
from tiltflow.streams import stream
from tiltflow.training.base_statistics import BaseStatistics
from tiltflow.training.draw import InEpochs, Repeated, batches
from tiltflow.training.records import of_machine
from tiltflow.training.settings import Training

SHORT = {"num_inference_steps": 2}
METHODS: dict[str, dict[str, Any]] = {
    "adjoint-matching": {"num_inference_steps": 3},
    "score-as-action": {"preset": "ddpo", "num_inference_steps": 3},
    "orw-cfm-w2": {"num_inference_steps": 3, "num_passes": 2, "min_effective_sample_size": 1},
    "path-reweighted": {
        "num_inference_steps": 3,
        "path_steps": 3,
        "num_passes": 1,
        "min_effective_sample_size": 1,
        "first": {"name": "adjoint-matching"},
        "first_steps": 1,
    },
}


SIDES = {"sana": 32, "lumina2": 64}
"""Of the smallest pictures that the tiny pipelines take, where it is not 16."""


def recipe_for(folder: Path, name: str, method: str = "adjoint-matching", **changes: Any) -> dict[str, Any]:
    """A recipe of three updates, its pipeline saved in `folder`."""
    source = folder / name
    if not source.exists():
        tiny_pipeline(name, folder).save_pretrained(source)
    mode, side = "none" if name == "flux" else "rollout", SIDES.get(name, 16)
    return {
        "model": {"diffusers": str(source), "height": side, "width": side, "guidance_scale": 3.0, "adapter": {"rank": 2}},
        "prompts": {"texts": ["a red cat", "a blue dog", "a green hat"], "validation": 0.34},
        "reward": "named-colour",
        "method": {"name": method, **METHODS[method]},
        "optimizer": {"learning_rate": 5e-2 if method == "adjoint-matching" else 1e-2},
        "training": {
            "max_train_steps": 3, "prompts_per_step": 2, "num_generations": 2, "micro_batch_size": 2, "guidance_mode": mode,
        },
        "evaluation": {
            "num_prompts": 2, "num_generations": 2,
            "points": [{"num_inference_steps": 2}, {"num_inference_steps": 3, "solver": "memoryless", "guidance_scale": 1}],
        },
        **changes,
    }  # fmt: skip


def train(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    return run(validate(Recipe, tree, "recipe"), folder)


QUICK = {("stable-diffusion-3", method) for method in METHODS} | {
    (name, "adjoint-matching") for name in PIPELINES if name not in NEWER
}


def slow_unless(quick: bool) -> Any:
    return () if quick else pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "method"), [pytest.param(n, m, marks=slow_unless((n, m) in QUICK)) for n in PIPELINES for m in METHODS]
)
def test_every_method_on_every_family(name: str, method: str, tmp_path: Path) -> None:
    summary = train(recipe_for(tmp_path, name, method), tmp_path / "run")
    assert summary["path_kl"] > 0
    assert summary["reward_tuned"] != summary["reward_base"]
    assert summary["reward_tuned_error"] > 0
    assert len(summary["table"]) == 4
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert metrics[0].get("path_kl", 0) == 0  # before the first update the tuned sampler is that of the base


SHORT_METHOD = AdjointMatching(num_inference_steps=3)


@pytest.mark.parametrize("mode", ["none", "rollout", "full"])
def test_guidance_modes(mode: str, tmp_path: Path) -> None:
    """What acts and what learns: the velocities of a batch, against the guided and the unguided field by hand."""
    model = with_adapter(from_diffusers(tiny_pipeline("stable-diffusion", tmp_path), guidance_scale=4.0))
    training = Training(prompts_per_step=1, num_generations=3, guidance_mode=mode)  # type: ignore[arg-type]
    batch = batches(model, [Item("a red cat")], lambda x: x[:, 0, 0, 0], SHORT_METHOD, training.for_prompts())(stream(0, "b"))
    condition, negative = model.encode(["a red cat"] * 3)
    assert isinstance(model.flow, Flow)
    plain, empty = (model.flow.bind(part)(batch.x, torch.tensor(0.4)) for part in (condition, negative))
    guided = empty + 4 * (plain - empty)
    learning = batch.bind(model.flow)
    assert torch.allclose(learning(batch.x, torch.tensor(0.4)), guided if mode == "full" else plain, atol=1e-5)
    assert (batch.guide is not None) == (mode == "rollout")
    if batch.guide is not None:
        assert torch.allclose(batch.guide(learning)(batch.x, torch.tensor(0.4)), guided, atol=1e-5)
    assert not torch.allclose(guided, plain, atol=1e-3)
    some, t = torch.tensor([2, 0]), torch.tensor(0.4)  # what is left where rewards of others are not finite
    torch.testing.assert_close(learning.select(some)(batch.x[some], t), learning(batch.x, t)[some], rtol=1e-4, atol=1e-5)


def test_what_is_regressed_in_rollout_mode_is_the_unguided_field(tmp_path: Path) -> None:
    """At the base the control is zero, though the trajectories are guided ones."""
    model = with_adapter(from_diffusers(tiny_pipeline("stable-diffusion", tmp_path), guidance_scale=4.0))
    training = Training(prompts_per_step=1, num_generations=2, guidance_mode="rollout")
    reward = partial(torch.mean, dim=(1, 2, 3))
    batch = batches(model, [Item("a red cat")], reward, SHORT_METHOD, training.for_prompts())(stream(0, "b"))
    assert isinstance(model.flow, Flow)
    tuned, base = batch.bind(model.flow), batch.bind(model.base().flow)
    for micro in (None, 1):
        updates = iterate(
            AdjointMatching(num_inference_steps=3, bootstrap=0.5),
            tuned,
            base,
            batch.reward,
            batch.x,
            stream(1),
            {},
            start=model.grid,
            guide=batch.guide,
            micro_batch_size=micro,  # type: ignore[arg-type]
        )
        measured = next(iter(updates))
        assert measured["path_kl"] < 1e-9
        assert measured["loss"] > 0


def test_the_path_kl_is_that_of_the_definition(tmp_path: Path) -> None:
    """Of two chains with the same noise, sum_k |w_k|^2 / 2: with the velocities moved by a constant, in closed form."""
    model = from_diffusers(tiny_pipeline("stable-diffusion-3", tmp_path))
    network, shift = model.denoiser, 0.01

    class Moved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.network

        def forward(self, x: Tensor, time: Tensor, condition: Any) -> Tensor:
            return network(x, time, condition) + shift

    from dataclasses import replace

    moved = replace(model, flow=replace(model.flow, network=Moved()))
    chain = Sampling(num_inference_steps=model.sampling.num_inference_steps).chain(model.grid)
    size = torch.tensor(model.event_shape).prod().item()
    exact = (chain.control_scale**2).sum().item() * shift**2 * size / 2
    for texts, batch_size in (("aa", 2), ("aabb", 4), ("aabb", 3)):
        items = [Item(text) for text in texts]
        found = tuned_paths(moved, model, items, model.sampling, seed=0, batch_size=batch_size).costs
        torch.testing.assert_close(found, torch.full_like(found, exact), rtol=1e-3, atol=0)


# ---- export ----

SEPARATE = """
import sys, torch
sys.modules["tiltflow"] = None  # an import of it fails
code, latents, out = sys.argv[1:]
said = {}
exec(open(code).read(), said)
latents = torch.load(latents, weights_only=True)
pipeline, sampling = said["pipeline"], said["sampling"]
torch.save(pipeline("a red cat", latents=latents, output_type="pt", **sampling).images, out)
"""
EXPORTED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # family, changes of the recipe's model, and the pipeline's own scheduler where it is not the usual one
    "stable-diffusion": ("stable-diffusion", {"scheduler": {"timestep_spacing": "trailing"}}, {"scheduler": "PNDM"}),
    "stable-diffusion, euler": ("stable-diffusion", {"scheduler": {"timestep_spacing": "linspace"}}, {"scheduler": "Euler"}),
    "stable-diffusion, all of it": ("stable-diffusion", {"scheduler": {"timestep_spacing": "trailing"}, "adapter": None}, {}),
    "stable-diffusion-xl": ("stable-diffusion-xl", {"scheduler": {"timestep_spacing": "trailing"}}, {}),
    "stable-diffusion-3": ("stable-diffusion-3", {"scheduler": {"shift": 1.5}}, {}),
    "flux": ("flux", {"scheduler": {"base_shift": 0.9}, "width": 32}, {}),
    "pixart-sigma": ("pixart-sigma", {"scheduler": {"timestep_spacing": "trailing"}}, {}),
    "sana": ("sana", {"scheduler": {"flow_shift": 2.0, "solver_order": 2}}, {}),
    "lumina2": ("lumina2", {"scheduler": {"shift": 3.0}, "width": 128}, {}),
}
QUICK_EXPORTS = ("stable-diffusion",)


@pytest.mark.filterwarnings("ignore:scheduler (PNDM|DPMSolverMultistep)Scheduler")
@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_unless(name in QUICK_EXPORTS)) for name in EXPORTED])
def test_the_code_of_an_exported_card_draws_what_the_run_measured(name: str, tmp_path: Path) -> None:
    """In a process without tiltflow, from its folder: with a scheduler that the recipe changed, and the size, the steps and the
    guidance of the evaluation."""
    from diffusers import EulerDiscreteScheduler, PNDMScheduler

    family, changes, base = EXPORTED[name]
    tree = recipe_for(tmp_path, family)
    if base:
        kind = {"PNDM": PNDMScheduler, "Euler": EulerDiscreteScheduler}[base["scheduler"]]
        pipeline = tiny_pipeline(family, tmp_path)
        pipeline.scheduler = kind(**STABLE_DIFFUSION)
        pipeline.save_pretrained(tmp_path / family)
    tree["model"] |= changes
    tree["evaluation"]["points"] = [{"num_inference_steps": 5, "guidance_scale": 2.5}]
    train(tree, tmp_path / "run")
    result = export_run(tmp_path / "run", tmp_path / "exported")
    assert result["kind"] == ("full" if tree["model"]["adapter"] is None else "lora")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "base_model:" in card
    assert "mean reward, held-out prompts" in card
    assert "other latents" not in card

    recipe = read_run(tmp_path / "run")
    point, tuned = recipe.evaluation.points[0], load_text_to_image(tmp_path / "run")
    latents = torch.randn(2, *tuned.event_shape, generator=stream(recipe.seed, "sample", 0))  # those of the evaluation
    drawn = {"seed": recipe.seed, "sampling": point.sampling, "guidance_scale": point.guidance_scale, "batch_size": 2}
    ours = tuned.sample(["a red cat"] * 2, **drawn)
    (tmp_path / "card.py").write_text(card.split("```python\n")[1].split("```")[0])
    torch.save(latents[:1], tmp_path / "latents.pt")
    arguments = [str(tmp_path / file) for file in ("card.py", "latents.pt", "image.pt")]
    path = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    exported = tmp_path / "exported"
    subprocess.run([sys.executable, "-c", SEPARATE, *arguments], check=True, capture_output=True, cwd=exported, env=path)
    theirs = torch.load(tmp_path / "image.pt", weights_only=True)
    assert theirs.shape == ours[:1].shape
    assert (ours[:1].clamp(-1, 1) - (2 * theirs - 1)).abs().max() < 1e-4
    before = tuned.base().sample(["a red cat"] * 2, **drawn) if tree["model"]["adapter"] else None
    assert before is None or (ours - before).abs().max() > 1e-3


def test_an_export_says_where_it_draws_other_pictures(tmp_path: Path) -> None:
    """Three steps do not divide a thousand, which DDIMScheduler's own steps need with this spacing."""
    tree = recipe_for(tmp_path, "stable-diffusion")
    tree["model"]["scheduler"] = {"timestep_spacing": "trailing"}
    tree["evaluation"]["points"] = [{"num_inference_steps": 3, "solver": "memoryless"}]
    train(tree, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model" / "scheduler")  # as an earlier version wrote it
    (tmp_path / "run" / "model" / "sampling.json").unlink()
    export_run(tmp_path / "run", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "drawn by the solver memoryless, which diffusers does not have" in card
    assert "At 3 steps DDIMScheduler draws other latents than were measured, by 0." in card


def test_a_run_reads_like_a_pipeline(tmp_path: Path) -> None:
    train(recipe_for(tmp_path, "stable-diffusion"), tmp_path / "run")
    tuned, loaded = load_text_to_image(tmp_path / "run"), load(tmp_path / "run")
    assert isinstance(loaded, TextToImage)
    assert loaded.sampling == tuned.sampling == Sampling(solver="euler", num_inference_steps=2)  # the evaluation's first point
    a, b = (one.sample(["a red cat"], seed=1) for one in (tuned, loaded))
    assert torch.equal(a, b)


# ---- evaluation ----


def test_standard_errors_are_over_groups() -> None:
    """Pictures of one prompt that are all alike are one piece of evidence."""
    values = torch.tensor([1.0, 1, 1, 1, 3, 3, 3, 3])
    assert over_groups(values, 4).value == 2
    assert over_groups(values, 4).standard_error == pytest.approx(1)
    assert over_groups(values, 8).standard_error == pytest.approx(values.double().std().item() / 8**0.5)


def test_the_effective_number_of_different_pictures() -> None:
    assert effective_number(torch.ones(5, 5).double()).item() == pytest.approx(1)
    assert effective_number(torch.eye(5).double()).item() == pytest.approx(5)
    pairs = torch.kron(torch.eye(2), torch.ones(3, 3)).double()  # two kinds, three of each
    assert effective_number(pairs).item() == pytest.approx(2)


def test_pictures_that_are_all_alike_have_no_variance() -> None:
    one = torch.rand(2, 3, 4, 4, generator=stream(0, "x")).repeat_interleave(3, 0)
    asked = Asked.of_prompts([Item("a"), Item("b")], 3)
    assert diversity(one, asked)["variance"] == pytest.approx(0, abs=1e-12)
    assert diversity(one, asked)["vendi"] == pytest.approx(1)
    other = torch.rand(6, 3, 4, 4, generator=stream(0, "x"))
    features = diversity(torch.nn.functional.normalize(other.flatten(1), dim=1), asked)
    assert 0 < features["variance"] < 2
    assert 1 < features["vendi"] < 3


@pytest.mark.parametrize("prompts", [1, 3])
def test_the_vendi_score_of_pixels_falls_as_pictures_become_one(prompts: int) -> None:
    """Towards their own mean, which is the base's, and towards another picture; with one prompt as with several."""
    count = 16
    base = torch.rand(prompts * count, 3, 4, 4, generator=stream(0, "x"), dtype=torch.float64)
    scale, asked = squared_distance(base, count), Asked.of_prompts([Item("a")] * prompts, count)
    assert scale == pytest.approx(2 * diversity(base, asked)["variance"])
    own = base.reshape(prompts, count, -1).mean(1).repeat_interleave(count, 0).reshape(base.shape)
    for end in (own, torch.zeros_like(base)):
        scores = [diversity(end + contrast * (base - end), asked, scale)["vendi"] for contrast in (1, 0.5, 0.1, 1e-4)]
        assert scores == sorted(scores, reverse=True)
        assert scores[0] > 7
        assert scores[2] < 1.2
        assert scores[3] == pytest.approx(1, abs=1e-4)
    # two kinds of picture far apart: two, whatever the scale
    two = torch.cat([torch.zeros(8, 3, 4, 4), 1e3 * torch.ones(8, 3, 4, 4)])
    assert diversity(two, Asked.of_prompts([Item("a")], 16), scale)["vendi"] == pytest.approx(2)


def test_a_target_that_is_known_is_tested_prompt_by_prompt(tmp_path: Path) -> None:
    """56 pictures of each of two held-out prompts say what a weak tilt is; two of each do not, and then nothing is said."""
    texts = {"texts": ["a red cat", "a blue dog", "a green hat", "a red hat"], "validation": 0.5}
    evaluation = {"num_prompts": 2, "num_generations": 56, "batch_size": 112, "points": [SHORT], "rewards": ["png-size"]}
    tree = recipe_for(tmp_path, "stable-diffusion", prompts=texts, evaluation=evaluation)
    summary = train(tree, tmp_path / "run")
    assert summary["target_unknown"] is None
    assert {row["statistic"] for row in summary["tests"]} == {"mean reward", "distance in reward", "mean png-size"}
    assert summary["effective_sample_size_of_group"] == pytest.approx(summary["effective_sample_size"] / 2)
    assert abs(summary["reward_target_bias"]) < summary["reward_target_error"] + 1e-3
    assert summary["reward_distance_floor"] == summary["target_distance_floor"] > 0
    assert summary["path_kl_target"] is None  # of the guided law, beside unguided paths
    assert summary["path_kl_error"] > 0
    few = validate(Recipe, {**tree, "evaluation": {**evaluation, "num_generations": 2}}, "recipe")
    write_yaml(tmp_path / "run" / "recipe.yaml", few.model_dump(mode="json"))
    unknown = evaluate_run(tmp_path / "run")
    assert "The 2 base samples of a prompt have an effective sample size of" in unknown["target_unknown"]
    assert unknown["reward_target"] is unknown["target_distance"] is unknown["reward_distance"] is None
    assert unknown["verdict"]["text"].startswith("No verdict")
    assert unknown["reward_gain"] is not None


def test_prompts_are_repeated_and_their_noise_is_not(tmp_path: Path) -> None:
    model = from_diffusers(tiny_pipeline("stable-diffusion", tmp_path))
    training = Training(prompts_per_step=2, num_generations=3, guidance_mode="none")
    seen: list[Any] = []

    class Told:
        def given(self, prompts: list[str], metadata: Any) -> Told:
            seen.append(prompts)
            return self

        def __call__(self, x: Tensor) -> Tensor:
            return x.flatten(1).mean(1)

    draw = batches(model, [Item("a"), Item("b"), Item("c")], Told(), SHORT_METHOD, training.for_prompts())
    batch = draw(stream(0, "one"))
    assert [seen[0][0]] * 3 + [seen[0][3]] * 3 == list(seen[0])
    assert seen[0][0] != seen[0][3]
    assert len({float(x.flatten()[0]) for x in batch.x}) == 6
    draw(stream(1, "one"))
    draw(stream(2, "one"))
    assert len({prompts[0] for prompts in seen}) > 1


def test_epochs_have_each_prompt_once() -> None:
    """Whatever the size of a batch; in another order each time, by the seed."""
    items = [Item(str(i)) for i in range(7)]
    row = [item.text for k in range(0, 42, 3) for item in Repeated(InEpochs(items, 3, 5), 2)(stream(0), 2 * k)][::2]
    epochs = [row[k : k + 7] for k in range(0, 42, 7)]
    assert all(sorted(epoch) == [item.text for item in items] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert [item.text for item in InEpochs(items, 9, 5)(stream(1), 4)] == row[4:13]
    assert [item.text for item in InEpochs(items, 7, 6)(stream(0), 0)] != epochs[0]


def test_two_runs_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    tree = recipe_for(tmp_path, "stable-diffusion", evaluation={"num_prompts": 1, "num_generations": 2, "points": [SHORT]})
    first, second = (train(tree, tmp_path / name) for name in ("one", "two"))
    assert first["table"] == second["table"]


# ---- the command line ----


def test_from_the_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    small = {"num_prompts": 1, "num_generations": 2, "points": [SHORT]}
    recipe.write_text(json.dumps(recipe_for(tmp_path, "stable-diffusion", evaluation=small)))
    runner = CliRunner()

    def call(*arguments: str) -> Any:
        result = runner.invoke(app, [*arguments, "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout.splitlines()[-1])

    run = str(tmp_path / "run")
    summary = call("train", str(recipe), "--output", run)
    again = call("evaluate", run)
    assert again["table"] == summary["table"]
    call("sample", run, "--prompt", "a red cat", "--output", str(tmp_path / "cat.png"))
    assert (tmp_path / "cat.png").stat().st_size > 100
    assert call("export", run, "--output", str(tmp_path / "exported"))["kind"] == "lora"
    assert "Guidance" in (tmp_path / "run" / "report.html").read_text()


# ---- what cannot work: one line, nothing written ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"prompts_per_step": 3, "num_generations": 2, "micro_batch_size": 4}}, "6 pictures do not divide"),
        ({"prompts": {"texts": []}}, "give either a path or texts"),
        ({"prompts": {"path": "nowhere.txt"}}, "cannot be read"),
        ({"prompts": {"texts": ["a cat"]}}, "names no colour"),
        ({"reward": "jpeg-size"}, "has no gradient"),
        ({"reward": "named-color"}, "did you mean 'named-colour'"),
        ({"method": {"name": "adjoint-matching", "shift": 3.0}}, "its own time grid"),
        ({"method": {"name": "adjoint-matching", "spacing": "middle"}}, "leave spacing at even"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tree = recipe_for(tmp_path, "stable-diffusion") | changes
    with pytest.raises(InputError, match=message):
        train(tree, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_guidance_of_a_distilled_model_is_refused(tmp_path: Path) -> None:
    tree = recipe_for(tmp_path, "flux", training={"guidance_mode": "full"})
    with pytest.raises(InputError, match="distilled from guidance"):
        train(tree, tmp_path / "run")


def test_what_is_no_run_is_not_exported(tmp_path: Path) -> None:
    for name in ("model", "metrics.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "recipe.yaml").write_text("model: digits-flow\nmethod: tilt-matching\n")
    with pytest.raises(InputError, match="reward is missing"):
        export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_rank_is_refused(tmp_path: Path) -> None:
    train(recipe_for(tmp_path, "stable-diffusion"), tmp_path / "run")
    recipe = read_run(tmp_path / "run")
    assert recipe.source.adapter is not None
    adapter = recipe.model.adapter.model_copy(update={"rank": 3})
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"adapter": adapter})})
    with pytest.raises(InputError, match="is not an adapter of this model"):
        load_run(other, tmp_path / "run")


def test_the_ratio_is_one_before_the_first_update(tmp_path: Path) -> None:
    """The likelihood ratio of a step, from the velocities of two calls: exactly 1."""
    model = with_adapter(from_diffusers(tiny_pipeline("stable-diffusion-3", tmp_path)))
    assert isinstance(model.flow, Flow)
    flow = model.flow.bind(model.encode(["a red cat"] * 4)[0])
    chain = Sampling(num_inference_steps=4).chain(model.grid)
    with torch.no_grad():
        path = rollout(chain, flow, model.start(4, stream(0, "x"), chain.times[0]), stream(1))
    for k, v in enumerate(path.velocities):
        again = flow(path.states[k], chain.times[k])
        assert torch.equal(again, v)


# ---- the recipes that ship ----

FAMILY = {"stable-diffusion-v1-5": "stable-diffusion", "stabilityai": "stable-diffusion-3"}
PUBLISHED = [
    name
    for name, path in shipped_recipes("train").items()
    if "diffusers" in read_yaml(path)["model"]
    and name not in ("tiles-colour", "wan-clip-score", "sd35-vlm-judge")
    and not name.endswith("gb")  # test_memory_forecast.py has those for one card
]


OF_TABLE = {
    "model": {"adapter": {"rank": 8}, "guidance_scale": 5, "dtype": "float32"},
    "method": {"num_inference_steps": 20},
    "optimizer": {"learning_rate": 1e-4, "adam_weight_decay": 1e-2, "max_grad_norm": 1},
    "training": {"max_train_steps": 400, "train_batch_size": 32},
    "evaluation": {"num_generations": 16},
}
RELEASED = {
    "model": {"adapter": None, "guidance_scale": 7.5, "scheduler": {"beta_start": 0.002, "beta_end": 0.009}},
    "method": {"num_inference_steps": 50, "share_timesteps": 5, "drop_quantile": 0.9, "solver": "ddim-half-way"},
    "training": {"micro_batch_size": 5, "num_generations": 1, "allow_tf32": True, "prompt_order": "epochs"},
    "evaluation": {"num_prompts": 100, "num_generations": 10},
    "prompts": {"validation": "benchmark_ir.json"},
}
"""microsoft/soc-fine-tuning-sd."""
OF_FLOW_GRPO: dict[str, Any] = {
    "model": {"adapter": {"rank": 32, "lora_alpha": 64}, "guidance_scale": 4.5, "height": 512, "width": 512},
    "method": {"num_inference_steps": 10, "standardize": True, "clip_range": 1e-4, "num_passes": 2},
    "optimizer": {"learning_rate": 3e-4},
    "training": {"num_generations": 24, "ema_decay": 0.9},
}
NUMBERS: dict[str, dict[str, Any]] = {
    "sd15-image-reward": RELEASED
    | {
        "method": RELEASED["method"] | {"beta": 1 / 100},
        "optimizer": {"learning_rate": 3e-6, "lr_warmup_steps": 20},
        "training": RELEASED["training"] | {"prompts_per_step": 5 * 25, "max_train_steps": 10 * 10_000 // 125},
    },
    "sd15-image-reward-buffer": RELEASED
    | {
        "method": RELEASED["method"] | {"beta": 1 / 100, "num_passes": 10},
        "optimizer": {"learning_rate": 3e-6, "lr_warmup_steps": 20},
        "training": RELEASED["training"] | {"prompts_per_step": 100},
    },
    "sd15-image-reward-single-prompt": {
        "model": RELEASED["model"],
        "method": RELEASED["method"],
        "optimizer": {"learning_rate": 1e-5},
        "training": {"prompts_per_step": 1, "allow_tf32": True},
        "evaluation": {"num_prompts": 1},
    },
    "sd15-single-prompt": {
        "model": {"adapter": {"rank": 4}, "guidance_scale": 7, "dtype": "float16"},
        "method": {
            "num_inference_steps": 50,
            "eta": 1,
            "clip_range": pytest.approx(1.5e-5 * 4 * 64 * 64, rel=0.02),
            "num_passes": 2,
        },
        "optimizer": {
            "learning_rate": 5e-5,
            "adam_beta2": 0.999,
            "adam_weight_decay": 1e-4,
            "max_grad_norm": 1,
            "lr_warmup_steps": 0,
        },
        "training": {"num_generations": 64 * 2 * 4, "prompts_per_step": 1, "max_train_steps": 100 * 2},
        "evaluation": {"num_prompts": 1},
    },
    "sd3-aesthetic": OF_TABLE | {"method": {"beta": 1 / 5e3, **OF_TABLE["method"]}},
    "sd3-hps": OF_TABLE | {"method": {"beta": pytest.approx(1 / 3e5, rel=2e-3), **OF_TABLE["method"]}},
    "sd3-pick-score": OF_TABLE | {"method": {"beta": 1 / 1e4, **OF_TABLE["method"]}},
    "sd3-spatial": {"reward": {"name": "clip-score"}},
    "sd35-ocr": OF_FLOW_GRPO | {"reward": {"name": "ocr", "anywhere": True}},
    "sd35-geneval": OF_FLOW_GRPO | {"reward": {"name": "http"}},
    "flux-kontext-counting": {
        "model": {
            "adapter": {"rank": 64, "lora_alpha": 128},
            "height": 512,
            "width": 512,
            "guidance_scale": 2.5,
            "max_sequence_length": 128,
            "dtype": "bfloat16",
        },
        "method": {"num_inference_steps": 6, "standardize": True, "num_passes": 2},
        "optimizer": {
            "learning_rate": 3e-4,
            "adam_beta2": 0.999,
            "adam_weight_decay": 1e-4,
            "max_grad_norm": 1,
            "lr_warmup_steps": 0,
        },
        "training": {
            "prompts_per_step": 48,
            "num_generations": 21,
            "micro_batch_size": 3,
            "allow_tf32": True,
            "ema_decay": 0.9,
        },
    },
}


def agree(settings: Any, published: dict[str, Any], where: str) -> None:
    for key, value in published.items():
        found = settings[key] if isinstance(settings, dict) else getattr(settings, key)
        if isinstance(value, dict):
            agree(found, value, f"{where}.{key}")
        else:
            assert found == value, f"{where}.{key}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_of_recipes_are_those_that_were_published(name: str) -> None:
    """And its comments say which are not."""
    agree(validate(Recipe, read_yaml(shipped_recipes("train")[name]), name), NUMBERS[name], name)
    comments = [line for line in shipped_recipes("train")[name].read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# Published") for line in comments)
    assert any(line.startswith(("# Guesses", "# Other than theirs")) for line in comments)


def numbers(tree: Any, where: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """The lines of the numbers and switches of a recipe, by their place in it; not of its lists."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= numbers(value, (*where, key))
        elif isinstance(value, int | float | None):
            found[*where, key] = tree.lc.data[key][0]
    return found


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "sd3-spatial"])  # of which nothing is
def test_a_number_that_was_not_published_says_so_in_its_line(name: str) -> None:
    """`guess`, or `ours` where it changes no result; a published one says neither."""
    text = shipped_recipes("train")[name].read_text(encoding="utf-8")
    for place, line in numbers(YAML().load(text)).items():
        published: Any = NUMBERS[name]
        for key in place:
            published = published.get(key, ...) if isinstance(published, dict) else ...
        marked = re.search(r"# (guess|ours)\b", text.splitlines()[line]) is not None
        assert marked == (published is ...), (name, place)


OF_PICTURES = [name for name in PUBLISHED if name != "flux-kontext-counting"]  # test_editing.py runs that


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=slow_unless(n in ("sd15-image-reward", "sd3-spatial"))) for n in OF_PICTURES]
)
def test_published_recipes_run_on_a_small_pipeline_of_their_class(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiltflow.rewards.ocr.reader", lambda: lambda image: "red" if image.mean() > 0 else "rod")
    monkeypatch.setattr("tiltflow.rewards.http.Http.build", lambda self, device: lambda x: x.mean((1, 2, 3)))
    tree: Any = read_yaml(shipped_recipes("train")[name])
    assert validate(Recipe, tree, name).description
    source = tmp_path / "pipeline"
    tiny_pipeline(FAMILY[tree["model"]["diffusers"].split("/")[0]], tmp_path).save_pretrained(source)
    clip, (image_reward, tokenizer) = str(tiny_clip(tmp_path)), tiny_image_reward(tmp_path)
    small = {
        "clip-score": {"model": clip},
        "pick-score": {"model": clip, "tokenizer": None},
        "hps": {"model": clip, "tokenizer": None},
        "aesthetic": {"model": clip, "head": str(tiny_aesthetic_head(tmp_path))},
        "image-reward": {"model": str(image_reward), "tokenizer": str(tokenizer)},
        "ocr": {},
        "http": {"url": "http://127.0.0.1:8777/score"},
    }

    def scorer(reward: Any) -> dict[str, Any]:
        kind = reward if isinstance(reward, str) else reward["name"]
        return {"name": kind, **small[kind]}

    tree["model"] |= {"diffusers": str(source), "height": 16, "width": 16, "dtype": "float32", "gradient_checkpointing": False}
    one = tree["training"]["prompts_per_step"] == 1  # where the method is refused with several
    tree["prompts"] = {"texts": ["a red cat"] if one else ['a "red" cat', 'a "dog"'], "validation": 0}
    tree["reward"] = scorer(tree["reward"])
    tree["method"]["num_inference_steps"] = 5
    if "num_passes" in tree["method"]:
        tree["method"]["num_passes"] = 2
    tree["training"] |= {"max_train_steps": 3, "prompts_per_step": 1 if one else 2, "num_generations": 2, "micro_batch_size": 2}
    tree["evaluation"] |= {
        "num_prompts": 2,
        "num_generations": 2,
        "rewards": [scorer(r) for r in tree["evaluation"]["rewards"]],
    }
    tree["evaluation"]["features"] = clip
    tree["evaluation"]["points"] = [{**point, "num_inference_steps": 2} for point in tree["evaluation"]["points"]]
    summary = train(tree, tmp_path / "run")
    assert summary["iterations"] == 3
    assert len(summary["table"]) == 2 * len(tree["evaluation"]["points"])
    assert {"variance", "vendi", tree["reward"]["name"]} <= set(summary["table"][0])


def test_a_run_goes_on_bit_for_bit_and_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {})
    training = recipe_for(tmp_path, "stable-diffusion")["training"] | {"max_train_steps": 5, "checkpointing_steps": 2}
    training |= {"ema_decay": 0.5, "monitor": {"steps": 2}, "per_prompt_normalization": 2, "non_finite_rewards": "drop"}
    training |= {"prompt_order": "epochs"}
    tree = recipe_for(tmp_path, "stable-diffusion", training=training)

    class Killed(BaseException):
        pass

    def watch(record: Any) -> None:
        if record.step == 4:
            raise Killed

    train(tree, tmp_path / "whole")
    tree["training"] = training | {"resume_from_checkpoint": "latest"}
    recipe = validate(Recipe, tree, "recipe")
    with pytest.raises(Killed):
        run(recipe, tmp_path / "parts", callbacks=[watch])
    patience = iter(range(100))  # a signal in the middle of a batch, which is then begun again
    with monkeypatch.context() as patch:
        patch.setattr(
            "tiltflow.runs.run_folder.noted", lambda heard, echo: nullcontext(lambda: 15 if next(patience) >= 6 else None)
        )
        with pytest.raises(Interrupted):
            run(recipe, tmp_path / "parts", handle_signals=True)
    run(recipe, tmp_path / "parts")
    for name in ("model", "best"):
        parts, whole = (load_file(tmp_path / run / name / "pytorch_lora_weights.safetensors") for run in ("parts", "whole"))
        assert parts.keys() == whole.keys()
        assert all(torch.equal(parts[key], whole[key]) for key in parts)
    assert (tmp_path / "parts" / "monitor.jsonl").read_bytes() == (tmp_path / "whole" / "monitor.jsonl").read_bytes()
    rows = [
        [{key: value for key, value in row.items() if not of_machine(key)} for row in read_records(tmp_path / run)]
        for run in ("parts", "whole")
    ]
    assert rows[0] == rows[1]
    looks = read_looks(tmp_path / "parts")
    assert [row["step"] for row in looks] == [0, 2, 4, 5]
    assert set(looks[0]["measures"]) == {"reward", "variety", "edge energy", "colour entropy"}


def test_a_run_is_of_its_base_and_prompts_wherever_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe says `pipe` and `prompts.txt`; another folder has others of these names."""
    monkeypatch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {"iterations": 1})
    home, away = tmp_path / "home", tmp_path / "away"
    tree = recipe_for(home, "stable-diffusion")
    (home / "stable-diffusion").rename(home / "pipe")
    shutil.copytree(home / "pipe", away / "pipe")
    weights = away / "pipe" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 0.5 for name, tensor in load_file(weights).items()}, weights)
    for folder in (home, away):
        (folder / "prompts.txt").write_text("a red cat\na blue dog\na green hat\n")
    tree["model"]["diffusers"], tree["prompts"] = "pipe", {"path": "prompts.txt", "validation": 0.34}
    tree["optimizer"]["lr_scheduler"] = "constant"
    tree["training"]["max_train_steps"] = 1
    monkeypatch.chdir(home)
    train(tree, home / "run")
    sampling = Sampling(solver="euler", num_inference_steps=2)
    expected = load_text_to_image(home / "run").sample(["a cat"], sampling=sampling)
    written = read_yaml(home / "run" / "recipe.yaml")
    assert written["model"]["diffusers"] == str(home / "pipe")
    assert written["prompts"]["path"] == str(home / "prompts.txt")
    monkeypatch.chdir(away)
    assert torch.equal(load_text_to_image(home / "run").sample(["a cat"], sampling=sampling), expected)

    tree["training"] |= {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
    with pytest.raises(InputError, match=r"started with another recipe: model\.diffusers"):
        train(tree, home / "run")
    monkeypatch.chdir(home)
    (home / "prompts.txt").write_text("quite\nother\nprompts\n")
    with pytest.raises(InputError, match=r"what prompts\.path names has changed"):
        train(tree, home / "run")
    shutil.copy(away / "prompts.txt", home / "prompts.txt")
    shutil.copytree(away / "pipe", home / "pipe", dirs_exist_ok=True)
    attempts: tuple[Callable[[], object], ...] = (
        lambda: load_text_to_image(home / "run"),
        lambda: export_run(home / "run", tmp_path / "exported"),
        lambda: train(tree, home / "run"),
    )
    for attempt in attempts:
        with pytest.raises(InputError, match=r"what model\.diffusers names has changed since the run was started"):
            attempt()
    with accept_changes(), pytest.warns(Note, match=r"accepted: what model\.diffusers"):
        assert not torch.equal(load_text_to_image(home / "run").sample(["a cat"], sampling=sampling), expected)
    shutil.rmtree(home / "pipe")
    with pytest.raises(InputError, match=f"model.diffusers {home / 'pipe'}: there is no such folder"):
        load_text_to_image(home / "run")


def test_every_prompt_is_tilted_as_hard_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward of training is (r - mean) / std of the base's pictures of the prompt, whatever the batch; so is the tilt of
    the report, which a constant for each prompt and a scale of the reward therefore leave as they are."""
    module = tmp_path / "my_rewards.py"
    module.write_text(
        "def plain(images):\n    return images.mean((1, 2, 3))\n"
        "def moved(images, prompts):\n"
        "    return 7 * plain(images) + images.new_tensor([len(prompt) for prompt in prompts])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tree = recipe_for(tmp_path, "stable-diffusion", reward={"name": "function", "path": "my_rewards:moved"})
    tree["training"]["per_prompt_normalization"] = 16
    recipe = validate(Recipe, tree, "recipe")
    base, _ = recipe.source.load("cpu").trainable(recipe.source.adapter)
    told = {}
    for function in ("plain", "moved"):
        reward = validate(Function, {"path": f"my_rewards:{function}"}, "reward").build()
        statistics = BaseStatistics(recipe.training, recipe.method.sampling, base, reward, recipe.seed)
        mean, std = statistics(["a red cat", "a blue dog", "a red cat"])
        images = base.sample(["a red cat"] * 64, seed=5, sampling=recipe.method.sampling, batch_size=32)
        values = given(reward, ["a red cat"] * 64)(images).double()
        assert mean[0] == mean[2] != mean[1]
        assert abs(mean[0] - values.mean()) < 4 * values.std() / 16**0.5
        assert 0.4 < std[0] / values.std() < 1.7
        told[function] = PerPrompt(reward, statistics).given(["a blue dog", "a red cat"])
        expected = (given(reward, ["a red cat"])(images[1:2]) - mean[0]) / std[0]
        torch.testing.assert_close(told[function](images[:2])[1:], expected.float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(told[function].select(slice(1, 2))(images[1:2]), told[function](images[:2])[1:])
    torch.testing.assert_close(
        told["plain"](images[:2]), told["moved"](images[:2]), rtol=5e-2, atol=5e-2
    )  # LEAST_STD is no scale
    summary = train(tree, tmp_path / "run")
    assert "standard deviations of the base's" in summary["target_law"]
    assert summary["effective_sample_size"] < 4  # of beta = 1 in the units of the prompt; the plain reward hardly varies


def test_distances_to_reference_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FID against the closed form of two Gaussians, KID against its definition (a kernel's unbiased MMD); both in the table."""
    x, y = (torch.randn(400, 3, generator=stream(i, "features"), dtype=torch.float64) for i in (0, 1))
    y = 2 * y + 1
    found = distances_to_reference(x, y)
    mean = (x.mean(0) - y.mean(0)).square().sum()
    assert found["fid"] == pytest.approx(3 * 1 + 3 * (2 - 1) ** 2, rel=0.2)
    assert found["fid"] > mean
    kernel = [(a @ b.T / 3 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = [(k.sum() - k.trace()) / (400 * 399) for k in kernel[:2]]
    assert found["kid"] == pytest.approx((within[0] + within[1] - 2 * kernel[2].mean()).item())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    monkeypatch.setattr("tiltflow.evaluation.features.MOST_KID", 100)  # subsets are drawn
    assert distances_to_reference(x, y) == distances_to_reference(x, y)
    assert distances_to_reference(x, y)["kid"] == pytest.approx(found["kid"], rel=0.1)
    assert torch.equal(torch.get_rng_state(), state)

    (tmp_path / "my_features.py").write_text(
        "def channels(images):\n    return images.mean((2, 3))\ndef wrong(images):\n    return images\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tree = recipe_for(tmp_path, "stable-diffusion")
    tree["evaluation"] |= {"features": "my_features:channels", "reference": "base"}
    tree["prompts"]["validation"] = 0  # of one prompt there is no mean over prompts
    summary = train(tree, tmp_path / "run")
    assert all(row["fid"] > 0 and "kid" in row and row["fid_per_prompt"] > 0 for row in summary["table"])
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 30, 90)).save(pictures / f"{i}.png")
    tree["evaluation"]["reference"] = str(pictures)
    assert reference_images(str(pictures), torch.zeros(1, 3, 8, 8)).shape == (4, 3, 20, 20)
    with pytest.raises(InputError, match=r"reference: samples are videos.* set base"):
        reference_images(str(pictures), torch.zeros(1, 5, 3, 8, 8))
    for change, message in (
        ({"features": "my_features:wrong"}, r"must return \[batch, width\]"),
        ({"features": "my_features:chanels"}, "did you mean 'channels'"),
        ({"reference": "nowhere"}, "no such data set"),
    ):
        wrong = {**tree, "evaluation": {**tree["evaluation"], **change}}
        with pytest.raises(InputError, match=message):
            train(wrong, tmp_path / "wrong")
        assert not (tmp_path / "wrong").exists()
    with pytest.raises(InputError, match="needs features"):
        validate(Recipe, {**tree, "evaluation": {"reference": "base"}}, "recipe")


def test_another_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = recipe_for(tmp_path, "stable-diffusion")
    tree["training"]["use_8bit_adam"] = True
    with pytest.raises(InputError, match="bitsandbytes is not installed"):
        train(tree, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    made: list[dict[str, Any]] = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, parameters: Any, **options: Any) -> None:
            made.append(options)
            super().__init__(parameters, **options)

    module = types.ModuleType("bitsandbytes.optim")
    module.AdamW8bit = AdamW8bit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    train(tree, tmp_path / "run")
    assert [options["lr"] for options in made] == [5e-2]


def test_settings_of_the_scheduler(tmp_path: Path) -> None:
    tree = recipe_for(tmp_path, "stable-diffusion")
    tree["model"]["scheduler"] = {"beta_start": 0.002, "beta_end": 0.009, "timestep_spacing": "trailing"}
    model = validate(Recipe, tree, "recipe").model.load("cpu")
    # terminal alpha^2 of these betas, as the authors' schedule has it
    t = model.own_grid(50)[0]
    assert (t**2 / (t**2 + (1 - t) ** 2)).item() == pytest.approx(0.00612, abs=1e-5)
    tree["model"]["scheduler"] = {"beta_strat": 0.002}
    with pytest.raises(InputError, match="DDIMScheduler has no 'beta_strat', did you mean 'beta_start'"):
        validate(Recipe, tree, "recipe").model.load("cpu")


@pytest.mark.slow
def test_dtypes_of_components(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a recipe, trained, loaded again, and exported with what differs in words."""
    monkeypatch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {})
    tree = recipe_for(tmp_path, "stable-diffusion")
    tree["model"]["dtype"] = {"default": "bfloat16", "text_encoder": "float32", "vae": "bfloat16"}
    train(tree, tmp_path / "run")
    model = load_text_to_image(tmp_path / "run")
    assert (model.pipeline.unet.conv_in.weight.dtype, model.pipeline.vae.dtype) == (torch.bfloat16, torch.bfloat16)
    assert model.pipeline.text_encoder.dtype == torch.float32
    export_run(tmp_path / "run", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "dtype=torch.bfloat16)" in card
    assert "its adapter in float32, its text_encoder in float32, its vae in bfloat16; this pipeline is all in bfloat16" in card


def test_dtypes_that_there_are_not(tmp_path: Path) -> None:
    tree = recipe_for(tmp_path, "stable-diffusion")
    for wrong, message in (
        ("bfloat", r"model\.dtype: 'bfloat' must be float32, float16, bfloat16, did you mean 'bfloat16'"),
        ({"default": "float61"}, r"model\.dtype: 'float61' must be .*, did you mean 'float16'"),
    ):
        with pytest.raises(InputError, match=message):
            validate(Recipe, {**tree, "model": {**tree["model"], "dtype": wrong}}, "recipe")


def test_stable_diffusion_3_without_t5(tmp_path: Path) -> None:
    """From a recipe: its conditions are then zero, as in the pipeline itself."""
    tree = recipe_for(tmp_path, "stable-diffusion-3")
    tree["model"]["without"] = ["text_encoder_3", "tokenizer_3"]
    model = validate(Recipe, tree, "recipe").model.load("cpu")
    pipeline = tiny_pipeline("stable-diffusion-3", tmp_path)
    pipeline.text_encoder_3 = None
    latents = torch.randn(1, *model.event_shape, generator=stream(0, "latents"))
    options = {"num_inference_steps": 3, "output_type": "latent", "height": 16, "width": 16, "guidance_scale": 3.0}
    expected = pipeline("a red cat", latents=latents.clone(), **options).images
    found = model.sample_latents(["a red cat"], latents=latents, sampling=Sampling(solver="euler", num_inference_steps=3))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    for without, message in (("text_encoder_4", "did you mean 'text_encoder_[23]?'"), ("vae", "has no vae")):
        tree["model"]["without"] = [without]
        with pytest.raises(InputError, match=message):
            validate(Recipe, tree, "recipe").model.load("cpu")


def test_a_recipe_that_starts_from_loras(tmp_path: Path) -> None:
    """At their strengths, in base and tuned alike, and what is new is trained alone."""
    tree, places = recipe_for(tmp_path, "stable-diffusion"), []
    for i in range(2):
        pipeline = tiny_pipeline("stable-diffusion", tmp_path)
        torch.manual_seed(i)
        pipeline.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_k", "to_q"]))
        pipeline.save_lora_weights(tmp_path / f"lora{i}", unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
        places.append(tmp_path / f"lora{i}")
    tree["model"]["loras"] = [{"path": str(places[0])}, {"path": str(places[1]), "strength": 0.5}]
    tree["evaluation"]["points"] = [{"num_inference_steps": 2, "guidance_scale": 1}]
    model = validate(Recipe, tree, "recipe").model.load("cpu")
    plain = tiny_pipeline("stable-diffusion", tmp_path)
    plain.load_lora_weights(places[0], adapter_name="a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.load_lora_weights(places[1], adapter_name="b")
    plain.set_adapters(["a", "b"], [1.0, 0.5])
    expected = from_diffusers(plain).sample(["a red cat"], guidance_scale=1, sampling=Sampling(solver="euler", **SHORT))
    found = model.sample(["a red cat"], guidance_scale=1, sampling=Sampling(solver="euler", **SHORT))
    assert (found - expected).abs().max() < 1e-5
    with pytest.warns(UserWarning, match="was trained on top of 'lora_0', 'lora_1'"):
        train(tree, tmp_path / "run")
    base, tuned = (load_text_to_image(tmp_path / "run").base(), load_text_to_image(tmp_path / "run"))
    for one, same in ((base, True), (tuned, False)):
        drawn = one.sample(["a red cat"], guidance_scale=1, sampling=Sampling(solver="euler", **SHORT))
        assert ((drawn - expected).abs().max() < 1e-5) == same
    export_run(tmp_path / "run", tmp_path / "exported")
    assert (
        'pipeline.set_adapters(["lora_0", "lora_1", "tuned"], [1.0, 0.5, 1.0])'
        in (tmp_path / "exported" / "README.md").read_text()
    )
    tree["model"]["loras"] = [{"path": str(tmp_path / "nowhere")}]
    with pytest.raises(InputError, match=r"model.loras.0.path .*nowhere: cannot be loaded"):
        validate(Recipe, tree, "recipe").model.load("cpu")


def test_two_rewards_of_one_name_are_both_measured(tmp_path: Path) -> None:
    """The one that was trained on is not overwritten by the one that is held out."""
    tree = recipe_for(tmp_path, "stable-diffusion")
    tree["reward"] = {"name": "named-colour", "width": 0.2}
    tree["evaluation"] = {
        "num_prompts": 1, "num_generations": 2, "points": [SHORT], "rewards": [{"name": "named-colour", "width": 2.0}],
    }  # fmt: skip
    summary = train(tree, tmp_path / "run")
    first, second = (summary["table"][0][key] for key in ("named-colour", "named-colour 2"))
    assert summary["reward_base"] == first < second


@pytest.mark.parametrize(
    ("method", "reward", "message"),
    [
        ({"name": "score-as-action", "estimator": "pathwise"}, "jpeg-size", "has no gradient, and method 'score-as-action'"),
        ({"name": "score-as-action"}, {"name": "energy", "data": "x.npz"}, "which it cannot from those of a pipeline"),
        (
            {"name": "score-as-action", "estimator": "temporal-difference"},
            "jpeg-size",
            "needs a critic that knows the prompt, and ours sees latents alone; use return-minus-value",
        ),
    ],
)
def test_rewards_that_the_method_cannot_use(method: Any, reward: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(recipe_for(tmp_path, "stable-diffusion") | {"method": method, "reward": reward}, tmp_path / "run")


def test_what_is_tuned_in_full_is_in_float32(tmp_path: Path) -> None:
    model = from_diffusers(tiny_pipeline("stable-diffusion", tmp_path).to(torch.bfloat16))
    _, tuned = model.trainable()
    assert {p.dtype for p in tuned.denoiser.parameters()} == {torch.float32}
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.bfloat16}
    batch = batches(
        tuned,
        [Item("a")],
        lambda x: x.mean((1, 2, 3)),
        SHORT_METHOD,
        Training(guidance_mode="none").for_prompts(),
    )(stream(0, "b"))
    a, b = (batch.bind(one.flow)(batch.x, torch.tensor(0.5)) for one in (tuned, model))  # type: ignore[arg-type]
    assert a.dtype == b.dtype == torch.float32
    assert (a - b).abs().max() < 0.1


def test_the_calibration_of_one_prompt_is_in_the_summary(tmp_path: Path) -> None:
    """The working temperature of its last step, and whether it is at its limit, which three steps do not reach."""
    tree = recipe_for(tmp_path, "stable-diffusion", prompts={"texts": ["a red cat"]}, evaluation={"num_generations": 2})
    tree["training"] |= {"prompts_per_step": 1, "calibration_samples": 128, "num_generations": 16, "micro_batch_size": 16}
    tree["evaluation"] |= {"points": [{"num_inference_steps": 2}]}
    tree["method"] |= {"beta": 50.0}
    summary = train(tree, tmp_path / "run")
    assert summary["working_beta"] == read_records(tmp_path / "run")[-1]["beta"]
    assert summary["calibration_at_limit"] is False
    assert not any("Calibration" in limit for limit in summary["limits"])
