"""The forecast of memory: beside what an iteration then needs, and what is published of the models that it knows."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

pytest.importorskip("diffusers")
from test_components import taesd
from test_doctor import recipe_for as network_recipe
from test_run_text_to_image import recipe_for as pipeline_recipe
from tiny_pipelines import tiny_pipeline
from typer.testing import CliRunner

import tiltflow.runs.evaluate as evaluation
import tiltflow.runs.run as module
from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError
from tiltflow.evaluation.monitor import Monitor
from tiltflow.models.compiled import compiled
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.rewards.energy import EnergyReward
from tiltflow.runs.doctor import Patient, admit
from tiltflow.runs.doctor.architecture import TINY, architecture, component, facts, model_from_configs, replacement
from tiltflow.runs.doctor.blocks import shortened
from tiltflow.runs.doctor.forecast import PHASES, Forecast, Known, of_patient, of_recipe
from tiltflow.runs.doctor.memory import finding
from tiltflow.runs.doctor.reward_shapes import reward_of_shapes
from tiltflow.runs.doctor.shapes import Counter, Peak, Replayed, Shapes, copy_of_shapes, shaped
from tiltflow.runs.recipe import Recipe, read_recipe, read_recipe_tree, shipped_recipes
from tiltflow.runs.run import run
from tiltflow.settings import read_yaml, validate
from tiltflow.training.memory import PeakMemory

ROOT = Path(__file__).parent.parent
PATHS = evaluation.PATHS_OF_PROMPTS
"""Those of a run; tests have fewer."""


def recipe(folder: Path, family: str = "stable-diffusion", side: int = 64, **changes: Any) -> Recipe:
    """A recipe for a small random pipeline of a family, with changed sections."""
    method = changes.pop("method", {})
    tree = pipeline_recipe(folder, family, method.pop("name", "adjoint-matching"))
    tree["model"] |= {"height": side, "width": side}
    tree["method"] |= method
    tree["training"] |= {"max_train_steps": 8}
    for section, values in changes.items():
        tree[section] |= values
    return validate(Recipe, tree, "recipe")


def measured(patient: Patient) -> dict[str, int]:
    """Bytes of all tensors that are made, at the peak of each phase of the iteration from which on all are alike: in the first
    one optimizers have no moments yet."""
    loop, needs = patient.loop(), patient.method.needs
    with PeakMemory() as memory:
        for _ in range(max(2, needs.batches_kept)):
            memory.by_phase.clear()
            for _ in range(needs.passes):
                next(loop)
        loop.close()
    return memory.by_phase


def measured_evaluation(recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of all tensors that the evaluation of a run makes, at the peak."""
    evaluate, found = module.evaluate, list[int]()

    def counted(*arguments: Any, **options: Any) -> Any:
        with PeakMemory() as memory:
            summary = evaluate(*arguments, **options)
        found.append(memory.peak)
        return summary

    monkeypatch.setattr(module, "evaluate", counted)
    run(recipe, folder)
    return found[0]


def beside_the_weights(forecast: Forecast) -> dict[str, float]:
    """Bytes of each phase."""
    return {name: peak.total - peak.parts["weights"] for name, peak in forecast.phases.items()}


def check(recipe: Recipe, tolerance: float) -> None:
    """Compare a forecast with what an iteration needs: phase by phase, and at the peak."""
    patient = admit(recipe, "cpu")
    said, found = beside_the_weights(of_patient(patient)), measured(patient)
    del said["evaluation"]
    for name in said:
        assert said[name] == pytest.approx(found[name], rel=tolerance), name
    assert max(said.values()) == pytest.approx(max(found.values()), rel=tolerance)


OF_PIXELS: dict[str, dict[str, Any]] = {
    "a critic": {"name": "score-as-action", "num_passes": 1},
    "adjoint-matching": {"name": "adjoint-matching"},
    "samples of earlier batches": {"name": "tilt-matching", "num_passes": 1, "replay": 5},
}


@pytest.mark.parametrize("name", ["a critic", *(pytest.param(name, marks=pytest.mark.slow) for name in list(OF_PIXELS)[1:])])
def test_the_forecast_is_what_an_iteration_needs(name: str, tmp_path: Path) -> None:
    """Of a network of pixels, in two micro-batches, with what lives from one iteration to the next: a critic and its moments,
    and the samples of five batches."""
    method = {"num_inference_steps": 4, **OF_PIXELS[name]}
    training = {"max_train_steps": 8, "train_batch_size": 32, "micro_batch_size": 16}
    check(network_recipe(tmp_path, method=method, training=training), 0.15)


def test_the_forecast_of_a_reward_that_learns(tmp_path: Path) -> None:
    """Its activations, moments and gradients, and the copies of its state that the loop has, are most of what is needed; its
    weights, and the data that it has, stay on the device."""
    data = {"x_train": np.zeros((40, 8, 8), np.uint8), "y_train": np.arange(40) % 2}
    np.savez(tmp_path / "data.npz", **data, x_test=data["x_train"], y_test=data["y_train"])
    network = {"name": "residual-classifier", "channels": [96], "classes": 1}
    asked = network_recipe(
        tmp_path,
        reward={"name": "energy", "data": str(tmp_path / "data.npz"), "network": network},
        method={"name": "dxmi", "solver": "euler", "num_inference_steps": 3},
        training={"max_train_steps": 8, "train_batch_size": 32, "micro_batch_size": 16, "offload": True},
    )
    patient = admit(asked, "cpu")
    found, reward = of_patient(patient), patient.reward
    assert isinstance(reward, EnergyReward)
    said, needed = beside_the_weights(found), measured(patient)
    assert needed[""] > needed["update"]  # it learns before the model does
    for name, phase in (("rollout", "rollout"), ("reward", "reward"), ("", "update")):
        assert said[phase] == pytest.approx(needed[name], rel=0.01), phase
    for there in found.resident.values():
        assert there["data of the reward"] == reward.images.nbytes
        assert there["reward 2"] == sum(p.nbytes for p in reward.network.parameters())


SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA, guidance, a decoder of its own batch size": {"training": {"decode_batch_size": 1}},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "room is made": {"training": {"offload": True}},
    "full": {"model": {"adapter": None}},
    "full, average": {"model": {"adapter": None}, "training": {"ema_decay": 0.9}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "autocast": {"training": {"mixed_precision": "bf16"}},
    "autocast, full": {"model": {"adapter": None}, "training": {"mixed_precision": "bf16"}},
    "guided adjoint": {"training": {"guidance_mode": "full"}},
    "four micro-batches, of which three are run": {"training": {"num_generations": 4}, "method": {"num_inference_steps": 12}},
    "reweighted passes": {"method": {"num_passes": 2, "reweight_passes": True}},
    "score-as-action": {"method": {"name": "score-as-action"}},
    "score-as-action, with a critic": {"method": {"name": "score-as-action", "preset": None}},
    "orw-cfm-w2": {"method": {"name": "orw-cfm-w2"}},
    "sd3": {"family": "stable-diffusion-3"},
    "sd3, full, checkpointing": {"family": "stable-diffusion-3", "model": {"adapter": None, "gradient_checkpointing": True}},
    "sd3, score-as-action": {"family": "stable-diffusion-3", "method": {"name": "score-as-action"}},
    "flux": {"family": "flux"},
    "xl": {"family": "stable-diffusion-xl"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_forecast_in_many_settings(name: str, tmp_path: Path) -> None:
    check(recipe(tmp_path, **SETTINGS[name]), 0.15)


def allocated(run: Callable[[], object]) -> int:
    """Bytes at the peak of what torch's allocator gives, to compiled code too."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    now = most = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        now += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, now)
    return most


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("trained", [False, True])
def test_a_compiled_network_needs_what_is_forecast_or_less(trained: bool) -> None:
    """The forecast is that of a network which is not compiled: of a product with the Jacobian, and of gradients of weights."""
    torch._dynamo.reset()
    network = small_unet().requires_grad_(trained)
    x = torch.randn(4, 4, 16, 16).requires_grad_(not trained)
    wanted = list(network.parameters()) if trained else [x]

    def run() -> None:
        torch.autograd.grad(network(x, torch.tensor(500.0), torch.ones(4, 7, 32)).sample.sum(), wanted)

    with PeakMemory() as memory:
        run()
    with compiled("whole", network):
        run()
        assert 0.85 * memory.peak < allocated(run) <= memory.peak


def small_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=8,
    )


@pytest.mark.parametrize("how", [None, "whole"])
def test_the_doctor_says_how_compiled_networks_are_counted(how: str | None, tmp_path: Path) -> None:
    asked = network_recipe(tmp_path, training={"max_train_steps": 2, "train_batch_size": 2, "compile": how})
    found = finding(asked, Forecast({"update": Peak({"weights": 8.0})}, {"update": {}}, {}), 100.0, on_gpu=False)
    assert ("training.compile: networks are counted as they are without it" in found.text) == (how is not None)


EVALUATIONS: dict[str, dict[str, Any]] = {
    "one at a time": {"evaluation": {"batch_size": 1}},
    "a network as a whole": {"model": {"adapter": None}},
    "many samples": {"evaluation": {"num_prompts": 2, "num_generations": 24}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["of pixels", *EVALUATIONS])
def test_the_forecast_is_what_an_evaluation_needs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "of pixels":
        asked = network_recipe(tmp_path, training={"max_train_steps": 1, "train_batch_size": 8, "micro_batch_size": 4})
    else:
        asked = recipe(tmp_path, **{**EVALUATIONS[name], "training": {"max_train_steps": 1}})
    said = beside_the_weights(of_patient(admit(asked, "cpu")))["evaluation"]
    assert said == pytest.approx(measured_evaluation(asked, tmp_path / "run", monkeypatch), rel=0.15)


@pytest.mark.slow
def test_looks_of_a_monitor_come_beside_what_an_iteration_leaves(tmp_path: Path) -> None:
    """The moments of AdamW: two numbers for each that is trained."""
    asked = network_recipe(tmp_path)
    monitored = asked.model_copy(update={"training": asked.training.model_copy(update={"monitor": Monitor()})})
    patient = admit(asked, "cpu")
    plain, looked = (of_patient(replace(patient, recipe=each)).phases["evaluation"] for each in (asked, monitored))
    moments = 2 * sum(p.nbytes for p in patient.tuned.parameters())
    assert looked.total - plain.total == pytest.approx(moments, rel=0.01)


def test_the_memory_of_a_loss_is_that_by_hand() -> None:
    """w x, its sine and the exponential of that live at once on the way out; w x is kept, beside the result. On the way back
    there are a cosine, and the gradients of the two that it is between."""
    w, n = nn.Parameter(shaped(())), 4 * 8 * 1000
    counter = Counter()
    call = Replayed(lambda x: (w * x).sin().exp(), counter, "network", lambda: [w])
    with Shapes(), counter:
        out = call(shaped((8, 1000)))
        (cost,) = call.known.values()
        assert (cost.forward, cost.kept, cost.backward) == pytest.approx((3 * n, n, 3 * n), abs=100)
        assert counter.now == pytest.approx(2 * n, abs=100)  # the result, and what is kept
        out.backward(torch.ones_like(out))
        del out
    assert w.grad is not None
    assert counter.now == pytest.approx(4, abs=100)
    assert counter.peak == pytest.approx(6 * n, abs=200)  # with the cotangent


class Rows(nn.Module):
    """Five blocks, nineteen others, and four that differ."""

    def __init__(self, *, checkpointing: bool):
        super().__init__()
        self.first, self.second = (nn.ModuleList(nn.Linear(8, 8) for _ in range(count)) for count in (5, 19))
        self.third = nn.ModuleList(nn.Linear(8, size) for size in (8, 8, 16, 16))
        self.checkpointing, self.calls = checkpointing, 0

    def forward(self, x: Tensor) -> Tensor:
        def wide(block: nn.Module, x: Tensor) -> Tensor:
            return x + block(x).exp().sin()

        for block in (*self.first, *self.second, *self.third[:2]):
            self.calls += 1
            x = checkpoint(wide, block, x, use_reentrant=False) if self.checkpointing else wide(block, x)
        return torch.cat([x + self.third[2](x)[:, :8], self.third[3](x)], 1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_of_many_blocks_that_are_alike_say_what_all_need(checkpointing: bool) -> None:
    """Without a gradient, with that of x, and with those of weights: to the byte what a call with all blocks needs."""
    network = copy_of_shapes(Rows(checkpointing=checkpointing))
    assert isinstance(network, Rows)
    whole = dict(network.named_children())
    for of_x, weights in ((False, []), (True, []), (False, list(network.parameters()))):
        costs, calls = list[Any](), list[int]()
        for contexts in ({}, {"contexts": shortened(network)}):
            counter, network.calls = Counter(), 0
            call = Replayed(network, counter, "network", lambda weights=weights: weights, **contexts)
            with Shapes(), counter, torch.set_grad_enabled(of_x or bool(weights)):
                call(shaped((1000, 8)).requires_grad_(of_x))
            costs += call.known.values()
            calls.append(network.calls)
        assert costs[0] == costs[1]
        assert costs[0].kept > 0 or not (of_x or weights)
        assert calls[1] < calls[0]
        assert dict(network.named_children()) == whole


def test_a_reward_that_wants_to_see_numbers_is_called_with_some(tmp_path: Path) -> None:
    counter, calls = Counter(), list[int]()

    def score(x: Tensor) -> Tensor:
        return torch.tensor([float(part.numpy().sum()) for part in x])

    def otherwise(x: Tensor, gradient: bool) -> Any:
        from tiltflow.runs.doctor.forecast import _measured_reward

        calls.append(len(x))
        return _measured_reward(score, torch.device("cpu"), x, gradient)

    call = Replayed(score, counter, "reward", numbers=True, otherwise=otherwise)
    with Shapes(), counter:
        assert call(shaped((4, 3, 8, 8))).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert calls == [4]


# ---- from configs alone ----


@pytest.mark.slow
def test_configs_of_a_folder_give_the_forecast_of_its_weights(tmp_path: Path) -> None:
    """The same pipeline, loaded and by its configs: the same weights and the same peaks."""
    asked = recipe(tmp_path, model={"text_encoders": "keep"})
    loaded, configs = of_patient(admit(asked, "cpu")), of_recipe(asked, apart=False)
    assert set(configs.phases) == {"encoding", *loaded.phases}
    assert sum(configs.resident["update"].values()) == sum(loaded.resident["update"].values())
    for name in loaded.phases:
        assert configs.phases[name].total == pytest.approx(loaded.phases[name].total, rel=0.02)


def test_a_model_whose_configs_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nobody/nothing: --config-only reads a folder with model_index.json and the"):
        architecture("nobody/nothing")
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        architecture(str(tmp_path / "nowhere"))
    asked = CliRunner().invoke(app, ["doctor", "digits-even", "--memory", "24"])
    assert str(asked.exception) == "--memory: only a forecast from configs can be of a GPU that is not here; add --config-only"
    assert all(architecture(name).components["vae"] for fact in facts().values() for name in fact["names"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization": {"unnet": "int8"}},
            "model.quantization.unnet int8: .* has no such network to quantize, did you mean",
        ),
        ({"quantization": {"vae": "int8"}}, "model.quantization.vae int8: .* has no such network to quantize"),
        ({"components": {"vea": "madebyollin/taesd"}}, "model.components: StableDiffusionPipeline has no 'vea', did you mean"),
        ({"without": ["text_encoder_3"]}, "model.components: StableDiffusionPipeline has no 'text_encoder_3'"),
        ({"dtype": {"va": "bfloat16"}}, "model.dtype: StableDiffusionPipeline has no 'va', did you mean 'vae'"),
    ],
)
def test_a_name_that_the_pipeline_does_not_have_is_refused_by_its_configs(changes: dict[str, Any], message: str) -> None:
    tree = {"diffusers": "stable-diffusion-v1-5", **changes}
    with pytest.raises(InputError, match=message):
        model_from_configs(validate(Diffusers, tree, "model"))


@pytest.mark.slow
def test_components_that_a_pipeline_may_do_without(tmp_path: Path) -> None:
    """Those that its folder has as null, and those that are never loaded."""
    pipeline = tiny_pipeline("stable-diffusion-3", tmp_path)
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(tmp_path / "without")
    without = ("text_encoder_3", "image_encoder")
    model = model_from_configs(Diffusers(diffusers=str(tmp_path / "without"), without=without))
    assert model.pipeline.text_encoder_3 is None


def test_the_forecast_is_told_in_words() -> None:
    """What fits, what is assumed, and where torch was seen to keep more."""
    recipe, other = (
        read_recipe(read_recipe_tree(shipped_recipes("train")[name], []), name)
        for name in ("digits-even-pixels", "sd15-single-prompt")
    )
    made = Forecast({"adjoint": Peak({"weights": 10.0 * 2**30})}, {"adjoint": {"network": 10 * 2**30}}, {})
    for gigabytes, words in (11, "does not fit"), (12, "fits, with little room"), (24, "fits"):
        said = finding(recipe, made, gigabytes * 2**30, on_gpu=True)
        first, *lines = said.text.splitlines()
        assert first.startswith(f"{words}: 11.2 GB at the peak, while computing the adjoint; the device has {gigabytes}.0 GB.")
        assert " 1.2 GB of it are assumed" in first
        assert len(lines) == 1
    assert "67 % of Score as Action" in finding(other, made, 24 * 2**30, on_gpu=True).text
    assert "assumed" not in finding(other, made, 24 * 2**30, on_gpu=False).text


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(facts()))
def test_published_models_have_as_many_parameters_as_is_published(name: str, tmp_path: Path) -> None:
    """A config with one wrong number has another count."""
    model = model_from_configs(source_of(name))
    for part, count in architecture(name).published.items():
        parameters = sum(p.numel() for p in model.pipeline.components[part].parameters())
        assert parameters == pytest.approx(count, rel=0.01), part


def source_of(name: str) -> Any:
    return Diffusers(diffusers=name, dtype="bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_small_decoders_have_as_many_parameters_as_is_published(name: str) -> None:
    """1,222,532 of the encoder and 1,222,531 of the decoder where latents have 4 channels; each further one takes 3 x 3 x 64 in
    both, and one more number on the way out of the encoder."""
    more = (TINY[name] - 4) * (2 * 9 * 64 + 1)
    network = component(replacement(name, "vae"), torch.float32)
    assert sum(p.numel() for p in network.parameters()) == 1_222_532 + 1_222_531 + more


@pytest.mark.slow
def test_published_rewards_have_as_many_parameters_as_is_published() -> None:
    """CLIP ViT-L/14 and H/14 as OpenAI and laion count them; ImageReward is a BLIP with 446 million."""
    from tiltflow.rewards.clip_score import ClipScore
    from tiltflow.rewards.image_reward import ImageReward
    from tiltflow.rewards.pick_score import PickScore

    settings = (ClipScore(), 428e6), (PickScore(), 986e6), (ImageReward(model="x"), 446e6)
    for each, count in settings:
        (network,) = reward_of_shapes(each)[1].values()
        assert sum(p.numel() for p in network.parameters()) == pytest.approx(count, rel=0.01), each.name


@pytest.mark.slow
def test_the_command_line_says_what_fits(tmp_path: Path) -> None:
    tree = pipeline_recipe(tmp_path, "stable-diffusion")
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(tree))
    found = CliRunner().invoke(app, ["doctor", str(path), "--config-only", "--memory", "24", "--json"])
    assert found.exit_code == 0, found.output
    (_, memory) = json.loads(found.stdout.splitlines()[-1])["findings"]
    assert memory["level"] == "green"
    assert set(memory["numbers"]["phases"]) == set(PHASES)
    small = CliRunner().invoke(app, ["doctor", str(path), "--config-only", "--memory", "0.7"])
    assert small.exit_code == 1
    assert "training.decode_batch_size=1: " in small.output
    (now,) = re.findall("does not fit: ([0-9.]+ [GM]B) at the peak", small.output)
    assert set(re.findall("in place of ([0-9.]+ [GM]B)", small.output)) == {now}


# ---- recipes for one card ----

CARDS = {"sdxl-12gb": "stable-diffusion-xl", "sd35-medium-24gb": "stable-diffusion-3", "flux-dev-24gb": "flux"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_for_a_card_runs_on_a_small_pipeline_of_its_class(name: str, tmp_path: Path) -> None:
    """With its own settings but sizes, and the packed weights that only a GPU can make."""
    tree: Any = read_yaml(shipped_recipes("train")[name])
    tiny_pipeline(CARDS[name], tmp_path).save_pretrained(tmp_path / "pipeline")
    tree["model"] |= {"diffusers": str(tmp_path / "pipeline"), "height": 16, "width": 16, "quantization": {}}
    if "components" in tree["model"]:
        taesd().save_pretrained(tmp_path / "taesd")
        tree["model"]["components"] = {"vae": str(tmp_path / "taesd")}
    tree["prompts"] = {"texts": ["a red cat", "a blue dog", "a green hat"], "validation": 0.34}
    tree["reward"] = "named-colour"
    tree["method"] |= {"num_inference_steps": 6}
    tree["training"] |= {"max_train_steps": 2, "prompts_per_step": 2, "num_generations": 2}
    tree["evaluation"] |= {"num_prompts": 1, "num_generations": 2, "points": [{"num_inference_steps": 2}]}
    run(validate(Recipe, tree, name), tmp_path / "run")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_for_a_card_fits_it(name: str) -> None:
    """As forecast, in as many gigabytes as the docs say, with what is assumed for CUDA; no GPU has measured it."""
    found = of_recipe(read_recipe(read_recipe_tree(shipped_recipes("train")[name], []), name)).on_a_gpu / 2**30
    assert found < int(name.split("-")[-1].removesuffix("gb"))
    lines = (ROOT / "docs/memory.md").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"| `{name}` |"))
    assert float(line.split("|")[3]) == pytest.approx(found, abs=0.06)


# ---- the table of what fits a card ----


def cells() -> dict[tuple[str, int], dict[int, tuple[tuple[str, ...], float] | None]]:
    """The settings and the gigabytes of each model and size by card, as the docs have them; None where it does not fit."""
    lines = (ROOT / "docs/memory.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| model | pixels |"))
    cards = [int(each.removesuffix(" GB")) for each in lines[start].strip("| ").split(" | ")[2:]]
    found: dict[tuple[str, int], dict[int, tuple[tuple[str, ...], float] | None]] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("| "):
            return found
        model, size, *row = line.strip("| ").split(" | ")
        parts = [None if each == "no" else each.partition(": ") for each in row]
        fits = [part and (tuple(part[2].split(", ")) if part[2] else (), float(part[0])) for part in parts]
        found[model, int(size)] = dict(zip(cards, fits, strict=True))
    raise AssertionError("the table has no end")


WHAT_FITS = runpy.run_path(str(ROOT / "benchmarks/what_fits.py"))


def test_the_table_of_what_fits_has_cells_that_the_command_could_print() -> None:
    for (model, _), row in cells().items():
        assert model in facts()
        assert tuple(row) == WHAT_FITS["CARDS"]
        needs = [float("inf") if cell is None else len(cell[0]) for cell in row.values()]
        assert needs == sorted(needs, reverse=True)  # more memory needs no more settings
        for card, cell in row.items():
            assert cell is None or (cell[1] <= card and set(cell[0]) <= set(WHAT_FITS["PHASES"]))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), cells())
def test_the_table_of_what_fits_is_what_the_doctor_says(model: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each cell, with its settings, and with as many paths in the evaluation as a run has."""
    monkeypatch.setattr(evaluation, "PATHS_OF_PROMPTS", PATHS)
    known: Known = {}
    for settings, gigabytes in {cell for cell in cells()[model, size].values() if cell is not None}:
        found = of_recipe(WHAT_FITS["recipe"](model, size, settings), known=known).on_a_gpu / 2**30
        assert gigabytes == pytest.approx(found, abs=0.06), settings
