"""The memory of text encoders and of what they encode: freed, on the CPU, in a bounded cache, with the same bits."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("diffusers")
from diffusers import ModelMixin
from test_run_text_to_image import recipe_for
from tiny_pipelines import PIPELINES, tiny_pipeline
from transformers import PreTrainedModel
from typer.testing import CliRunner

import tiltflow
from tiltflow import from_diffusers
from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError, Note
from tiltflow.models.pipelines import Condition
from tiltflow.models.prompt_encoder import Encoded, PromptEncoder
from tiltflow.models.text_encoders import TextEncoders
from tiltflow.rewards.named_colour import NamedColour
from tiltflow.runs.doctor.sampler import difference_to_pipeline
from tiltflow.runs.export import export_run
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import evaluate_run, run
from tiltflow.runs.run_files import read_records
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import validate

PROMPTS = ["a red cat", "a blue dog", "a green hat"]
SHORT = Sampling(solver="euler", num_inference_steps=2)


def saved(name: str, folder: Path) -> Path:
    if not (folder / name).exists():
        tiny_pipeline(name, folder).save_pretrained(folder / name)
    return folder / name


def tensors(condition: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(condition)


def same(one: Condition | None, other: Condition | None) -> bool:
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def weights_in(folder: Path) -> dict[str, bytes]:
    """The weights of an adapter; the header of its file is in any order."""
    found = load_file(folder / "pytorch_lora_weights.safetensors")
    return {key: found[key].numpy().tobytes() for key in sorted(found)}


@contextmanager
def parameters_made() -> Iterator[list[weakref.ref[Tensor]]]:
    """The parameters of all text encoders that pipelines are loaded with in this context."""
    made: list[weakref.ref[Tensor]] = []

    def note(encoders: TextEncoders) -> None:
        made.extend(weakref.ref(parameter) for part in encoders.parts.values() for parameter in part.parameters())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoders, "__post_init__", note)
        yield made


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "stable-diffusion-3" else pytest.mark.slow) for n in PIPELINES]
)
def test_freed_text_encoders_are_gone_and_come_back(name: str, tmp_path: Path) -> None:
    """Without the garbage collector's help, and with the bits of those that stayed."""
    model, kept = (from_diffusers(saved(name, tmp_path), height=16, width=16, text_encoders=use) for use in ("free", "keep"))
    parameters = [weakref.ref(parameter) for part in model.encoder.encoders.parts.values() for parameter in part.parameters()]
    first, expected = (one.encode(PROMPTS) for one in (model, kept))
    assert all(map(same, first, expected))
    assert len(parameters) > 10
    model.encoder.encode_ahead(PROMPTS, model.device)
    assert not any(reference() is not None for reference in parameters)
    assert model.pipeline.text_encoder is None
    assert all(map(same, model.encode(PROMPTS), expected))
    assert model.encoder.encoders.freed  # known prompts need none
    assert all(map(same, model.encode(["new", *PROMPTS]), kept.encode(["new", *PROMPTS])))
    again = model.encoder.encoders.parts
    assert again.keys() == kept.encoder.encoders.parts.keys()
    assert not any(part.training or parameter.requires_grad for part in again.values() for parameter in part.parameters())
    model.pipeline.save_pretrained(tmp_path / "whole")  # and is in the index of the pipeline again
    assert all(map(same, from_diffusers(tmp_path / "whole", height=16, width=16).encode(PROMPTS), expected))


def resumed(tree: dict[str, Any], folder: Path, use: str) -> dict[str, Any]:
    """The summary of a run that goes on for a step. What becomes of its text encoders may change."""
    tree["training"] |= {"max_train_steps": 3}
    tree["model"]["text_encoders"] = {"keep": "free", "free": "keep", "cpu": "cpu"}[use]
    return run(validate(Recipe, tree, "recipe"), folder)


@pytest.mark.parametrize(
    ("other", "measured"),
    [("free", False), *(pytest.param(use, True, marks=pytest.mark.slow) for use in ("free", "cpu"))],
)
def test_a_run_is_the_same_whatever_becomes_of_its_text_encoders(other: str, measured: bool, tmp_path: Path) -> None:
    """Bit for bit: metrics, weights, the report's table, what is evaluated and drawn later, resumed, and exported."""
    results: list[Any] = []
    for use in ("keep", other):
        tree, folder, seen = recipe_for(tmp_path, "stable-diffusion-3"), tmp_path / use, []
        tree["model"]["text_encoders"] = use
        tree["training"] |= {"max_train_steps": 2, "checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
        tree["optimizer"]["lr_scheduler"] = "constant"
        tree["evaluation"]["points"] = [{"num_inference_steps": 2}]
        with pytest.MonkeyPatch.context() as patch, parameters_made() as made:
            patch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {"table": []})
            recipe = validate(Recipe, tree, "recipe")
            run(recipe, folder, callbacks=[lambda record: seen.append(sum(one() is not None for one in made))])  # noqa: B023
            assert seen == [0 if use == "free" else len(made)] * 2
            assert len(made) > 10
            if not measured:
                resumed(tree, folder, use)
        table = resumed(tree, folder, use)["table"] if measured else []
        cost = ("seconds", "peak_memory")
        rows = [{key: value for key, value in row.items() if not key.startswith(cost)} for row in read_records(folder)]
        results.append([table, weights_in(folder / "model"), rows])
        if measured:
            arguments = ["sample", str(folder), "--prompt", "new", "--num-samples", "1", "--output", str(folder / "new.npz")]
            assert CliRunner().invoke(app, arguments, catch_exceptions=False).exit_code == 0
            export_run(folder, tmp_path / f"{use}-exported")
            results[-1] += [weights_in(tmp_path / f"{use}-exported"), (folder / "new.npz").read_bytes()]
    assert results[0] == results[1]
    assert not measured or evaluate_run(folder)["table"] == table != []


@pytest.mark.slow
def test_a_whole_pipeline_is_exported_with_its_text_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {})
    tree = recipe_for(tmp_path, "stable-diffusion")
    tree["model"] |= {"adapter": None}
    tree["evaluation"]["points"] = [{"num_inference_steps": 2}]
    run(validate(Recipe, tree, "recipe"), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "exported")
    before, after = (from_diffusers(path) for path in (tmp_path / "stable-diffusion", tmp_path / "exported"))
    assert all(map(same, before.encode(PROMPTS), after.encode(PROMPTS)))


def test_of_python_alike(tmp_path: Path) -> None:
    """`tune` frees them; what is sampled later loads them again, or says how to have them."""
    path, drawn = saved("stable-diffusion", tmp_path), []
    method = tiltflow.AdjointMatching(num_inference_steps=2)
    training = tiltflow.Training(max_train_steps=1, prompts_per_step=1, num_generations=2, guidance_mode="none")
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    for source, use in ((path, None), (path, "cpu"), (pipeline, "free")):
        model = from_diffusers(source, text_encoders=use)
        tuned = tiltflow.tune(model, NamedColour().build(), method, training, conditions=PROMPTS)
        assert (tuned.pipeline.text_encoder is None) == (use in (None, "free"))
        drawn.append(tuned.sample(PROMPTS[:1], sampling=SHORT))
        if source is pipeline:
            with pytest.raises(
                InputError, match=r'this prompt is new, and the text encoders were freed .* text_encoders="cpu"'
            ):
                tuned.sample(["new"])
        else:
            drawn.append(tuned.sample(["new"], sampling=SHORT))
    for i in (0, 1):
        assert torch.equal(drawn[i], drawn[2 + i])
    assert (drawn[4] - drawn[0]).abs().max() < 1e-5  # weights that were never on a disk lie elsewhere in memory
    assert from_diffusers(tiny_pipeline("stable-diffusion", tmp_path)).encoder.encoders.use == "keep"  # it is the user's own


def test_the_pipeline_is_whole_where_diffusers_calls_it(tmp_path: Path) -> None:
    model = from_diffusers(saved("stable-diffusion-3", tmp_path), height=16, width=16, text_encoders="free")
    model.encoder.encode_ahead(PROMPTS, model.device)
    assert difference_to_pipeline(model) < 1e-5
    assert model.encoder.encoders.freed == ("text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.mark.parametrize("name", ["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux"])
def test_text_encoders_on_another_device(name: str, tmp_path: Path) -> None:
    """Inputs are made where the text encoders are, not where the denoiser is: here on torch's device without numbers."""
    model = from_diffusers(tiny_pipeline(name, tmp_path), height=16, width=16)
    for part in model.encoder.encoders.parts.values():
        part.to("meta")
    view = model.encoder.encoders.ready()
    assert view.device == view._execution_device == torch.device("meta")
    pairs = model.family.encode(view, ["a"], model.size, model.encoder.options)
    assert {part.device.type for part in tensors(pairs) if part is not None} == {"meta"}
    assert view.vae is model.pipeline.vae


def test_the_denoiser_makes_room_for_text_encoders_that_are_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never both on the device. Nothing is moved here, and no prompt encoded: what would be on `meta` is written down."""
    there: set[str] = set()

    def moved(part: torch.nn.Module, device: Any = None, *_: Any, **__: Any) -> torch.nn.Module:
        (there.add if str(device) == "meta" else there.discard)(type(part).__name__)
        assert not {"SD3Transformer2DModel", "T5EncoderModel"} <= there
        return part

    def encoded(encoder: PromptEncoder, prompts: list[str], device: torch.device) -> None:
        encoder.encoders.ready()
        assert {"T5EncoderModel", "CLIPTextModelWithProjection", "AutoencoderKL"} <= there
        encoder.cache[prompts[0]] = Encoded(None, None, 1)

    def freed(encoders: TextEncoders) -> None:
        there.difference_update(type(part).__name__ for part in encoders.parts.values())
        free(encoders)

    path, free = saved("stable-diffusion-3", tmp_path), TextEncoders.free
    for kind in (torch.nn.Module, ModelMixin, PreTrainedModel):
        monkeypatch.setattr(kind, "to", moved)
    monkeypatch.setattr(PromptEncoder, "__call__", encoded)
    monkeypatch.setattr(TextEncoders, "free", freed)
    monkeypatch.setattr(torch.nn.Parameter, "device", torch.device("meta"), raising=False)
    model = from_diffusers(path, height=16, width=16, device="meta")
    assert "SD3Transformer2DModel" in there
    model.encoder.encode_ahead(PROMPTS, torch.device("meta"))
    assert there == {"SD3Transformer2DModel", "AutoencoderKL"}


def test_what_is_encoded_ahead_is_told_where_it_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which each prompt takes ten seconds."""
    model = from_diffusers(saved("stable-diffusion", tmp_path), height=16, width=16, text_encoders="free")
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("tiltflow.models.prompt_encoder.time.perf_counter", lambda: float(next(clock)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.encoder.encode_ahead([f"cat {n}" for n in range(5)], model.device)
    lines = [str(one.message) for one in said if one.category is Note]
    assert lines == ["2 of 5 prompts are encoded, 30.0 s left", "4 of 5 prompts are encoded, 10.0 s left"]


def test_ctrl_c_is_heard_while_prompts_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two prompts, each of which is a call of its own; the denoiser is then back on its device."""
    model = from_diffusers(saved("stable-diffusion", tmp_path), height=16, width=16, text_encoders="free")
    encode, asked = type(model.family).encode, []

    def interrupted(family: Any, pipeline: Any, prompts: list[str], *options: Any) -> Any:
        asked.append(prompts)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return encode(family, pipeline, prompts, *options)

    monkeypatch.setattr(type(model.family), "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.encoder.encode_ahead(PROMPTS, model.device)
    assert asked == [[PROMPTS[0]], [PROMPTS[1]]]
    assert model.device == torch.device("cpu")


def test_a_lora_of_the_text_encoders_is_not_lost(tmp_path: Path) -> None:
    from peft import LoraConfig

    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    with pytest.warns(Note, match="a LoRA is loaded into the text encoders"):
        model = from_diffusers(pipeline, text_encoders="free")
    before = model.encode(PROMPTS)
    model.encoder.encode_ahead(PROMPTS, model.device)
    assert not model.encoder.encoders.freed
    model.encoder.cache.clear()
    assert all(map(same, model.encode(PROMPTS), before))


def test_what_cannot_be(tmp_path: Path) -> None:
    tree = recipe_for(tmp_path, "stable-diffusion")
    for key, value, message in (
        ("text_encoders", "fre", "did you mean 'free'"),
        ("prompt_cache_gb", 0, "prompt_cache_gb.*greater than 0"),
    ):
        with pytest.raises(InputError, match=message):
            validate(Recipe, {**tree, "model": {**tree["model"], key: value}}, "recipe")
        with pytest.raises(InputError, match=message.replace("greater than", ".*above")):
            from_diffusers(tmp_path / "stable-diffusion", **{key: value})


# ---- the cache ----


def test_a_bounded_cache_changes_nothing(tmp_path: Path) -> None:
    """Conditions of prompts in any order, of which three fit; and where not all fit, nothing is freed."""
    path = saved("stable-diffusion-3", tmp_path)
    whole = from_diffusers(path, height=16, width=16)
    one = sum(part.nbytes for part in tensors(whole.encode(["a"])[0]))
    few = from_diffusers(path, height=16, width=16, prompt_cache_gb=3.5 * one / 2**30)
    order = torch.randint(0, 10, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    for i in range(0, 40, 4):
        prompts = [f"prompt {n}" for n in order[i : i + 4]]
        assert all(map(same, few.encode(prompts), whole.encode(prompts)))
        assert len(few.encoder.cache) <= 3
    assert len(whole.encoder.cache) == len({*order}) + 1
    with pytest.warns(Note, match=r"10 prompts are more than model.prompt_cache_gb, .*: the text encoders are not freed"):
        few.encoder.encode_ahead([f"prompt {n}" for n in range(10)], few.device)
    assert not few.encoder.encoders.freed


@pytest.mark.slow
def test_a_run_with_a_bounded_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds one prompt at a time, and what is learned is the same."""
    path = saved("stable-diffusion-3", tmp_path)
    one = sum(part.nbytes for part in tensors(from_diffusers(path, height=16, width=16).encode(["a"])[0]))
    monkeypatch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {})
    results = []
    for folder, gigabytes in (("one", one / 2**30), ("all", 4.0)):
        tree = recipe_for(tmp_path, "stable-diffusion-3")
        tree["model"]["prompt_cache_gb"] = gigabytes
        tree["evaluation"]["points"] = [{"num_inference_steps": 2}]
        message = r"3 prompts are more than model.prompt_cache_gb, .*: the text encoders are not freed"
        with pytest.warns(Note, match=message) if gigabytes < 1 else nullcontext():
            run(validate(Recipe, tree, "recipe"), tmp_path / folder)
        results.append(weights_in(tmp_path / folder / "model"))
    assert results[0] == results[1]


def test_the_cache_is_in_the_dtype_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what the network would make of it; and pinned for a GPU, of which there need be none."""
    pipeline = tiny_pipeline("stable-diffusion-xl", tmp_path)
    exact = from_diffusers(pipeline, height=16, width=16).encode(PROMPTS)
    pipeline.unet.to(torch.bfloat16)
    model, pinned = from_diffusers(pipeline, height=16, width=16), []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self.shape) or self)
    found = model.encode(PROMPTS)
    for ours, theirs in zip(tensors(found), tensors(exact), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16))
    assert {part.dtype for part in tensors([one[:2] for one in model.encoder.cache.values()])} == {torch.bfloat16}
    assert not pinned
    model.encoder.cache.clear()
    monkeypatch.setattr("tiltflow.models.prompt_encoder.on_device", lambda conditions, device: conditions)
    model.encoder(PROMPTS[:1], torch.device("cuda"))
    assert len(pinned) == 6
