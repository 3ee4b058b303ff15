"""Pipelines with quantized weights: messages anywhere, and the weights of torchao and bitsandbytes where those are."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
from safetensors.torch import load_file
from test_run_text_to_image import SEPARATE, recipe_for, train
from test_text_to_image import PROMPTS, euler, latents_of, theirs
from tiny_pipelines import tiny_pipeline

from tiltflow import from_diffusers, load_text_to_image
from tiltflow.errors import InputError
from tiltflow.flows.linearize import linearize
from tiltflow.models.denoiser import floating_dtype
from tiltflow.models.quantization import is_quantized, stored
from tiltflow.models.text_to_image import TextToImage, with_adapter
from tiltflow.processes import distribute
from tiltflow.runs.doctor import admit
from tiltflow.runs.doctor.memory import memory
from tiltflow.runs.export import export_run
from tiltflow.runs.fingerprints import of_network
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.settings import validate
from tiltflow.streams import stream

WITH_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
WITH_BITSANDBYTES = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
DENOISERS = {"stable-diffusion": "unet", "stable-diffusion-3": "transformer", "flux": "transformer"}


def saved(name: str, folder: Path) -> Path:
    tiny_pipeline(name, folder).save_pretrained(folder / name)
    return folder / name


def recipe(folder: Path, name: str = "stable-diffusion-3", **changes: Any) -> dict[str, Any]:
    tree = recipe_for(folder, name)
    tree["model"] |= changes
    return tree


# ---- anywhere ----


def test_settings_that_there_are_not(tmp_path: Path) -> None:
    for changes, message in (
        ({"quantization": {"transformer": "int9"}}, "transformer: 'int9' must be nf4, int8, float8, did you mean 'int8'"),
        ({"quantization": {"transformer": "int8"}, "adapter": None}, "quantized weights are frozen; give an adapter, not null"),
    ):
        with pytest.raises(InputError, match=message):
            validate(Recipe, recipe(tmp_path, **changes), "recipe")
    with pytest.raises(InputError, match="has no such network to quantize, did you mean 'transformer'"):
        validate(Recipe, recipe(tmp_path, quantization={"transformers": "int8"}), "recipe").model.load("cpu")
    with pytest.raises(InputError, match=r"quantization.vae int8: .*; known: text_encoder, text_encoder_2, .*transformer"):
        validate(Recipe, recipe(tmp_path, quantization={"vae": "int8"}), "recipe").model.load("cpu")
    with pytest.raises(InputError, match="quantization: a pipeline that is given has its own; give its path"):
        from_diffusers(tiny_pipeline("stable-diffusion", tmp_path), quantization={"unet": "int8"})


def test_packages_and_devices_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = saved("stable-diffusion", tmp_path)
    monkeypatch.setattr("tiltflow.models.quantization.find_spec", lambda name: None)
    for kind, package in (("int8", "torchao"), ("float8", "torchao"), ("nf4", "bitsandbytes")):
        with pytest.raises(InputError, match=rf"quantization.unet {kind}: {package} is not installed.*\[{package}\]"):
            from_diffusers(place, quantization={"unet": kind})
    monkeypatch.setattr("tiltflow.models.quantization.find_spec", lambda name: name)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(InputError, match="unet nf4: diffusers packs it on a GPU alone, and there is none"):
        from_diffusers(place, quantization={"unet": "nf4"})


def test_a_network_of_bytes_is_not_tuned_as_a_whole(tmp_path: Path) -> None:
    """Nor is the dtype that it computes in that of its bytes, or of its adapter."""
    pipeline = tiny_pipeline("stable-diffusion", tmp_path).to(torch.bfloat16)
    assert not is_quantized(pipeline.unet)
    model = with_adapter(from_diffusers(pipeline), rank=2, target_modules=["conv_in", "to_q"])
    first = pipeline.unet.conv_in.base_layer
    first.weight, first.bias = nn.Parameter(first.weight.detach().char(), requires_grad=False), None
    assert is_quantized(pipeline.unet)
    assert next(p.dtype for p in pipeline.unet.parameters() if p.is_floating_point()) == torch.float32  # of the adapter
    assert floating_dtype(pipeline.unet) == torch.bfloat16
    pipeline.unet.delete_adapters("default")
    with pytest.raises(InputError, match="adapter null tunes the whole unet, whose weights are quantized: use an adapter"):
        from_diffusers(pipeline).trainable()
    assert model.base().flow.flow.network is model.flow.network


def test_bytes_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Packed(nn.Parameter):
        """As bitsandbytes has them."""

    network = nn.Linear(2, 2)
    network.weight = Packed(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)
    monkeypatch.setattr("tiltflow.processes.count", lambda: 2)
    monkeypatch.setattr("tiltflow.processes._sharding", lambda: "fsdp")
    with pytest.raises(InputError, match="FSDP does not shard quantized weights"):
        distribute(network)


# ---- torchao ----


@WITH_TORCHAO
@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("name", DENOISERS)
def test_parity_with_the_pipeline(name: str, kind: str, tmp_path: Path) -> None:
    """The quantized pipeline that diffusers loads and draws with, as its documentation says."""
    import diffusers
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    place, part = saved(name, tmp_path), DENOISERS[name]
    model = from_diffusers(place, quantization={part: kind}, height=16, width=16)
    config = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[kind]()
    mapping = {part: diffusers.TorchAoConfig(config)}
    plain = type(model.pipeline).from_pretrained(
        place, quantization_config=diffusers.PipelineQuantizationConfig(quant_mapping=mapping), dtype=torch.float32
    )
    plain.set_progress_bar_config(disable=True)
    there = from_diffusers(plain, height=16, width=16)
    assert is_quantized(getattr(plain, part))
    latents = latents_of(model)
    expected = theirs(there, latents, 4, 3.0)
    found = model.sample_latents(PROMPTS, sampling=euler(4), guidance_scale=3.0, latents=latents)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    whole = from_diffusers(place, height=16, width=16)
    other = whole.sample_latents(PROMPTS, sampling=euler(4), guidance_scale=3.0, latents=latents)
    assert (found - other).abs().max() > 1e-4 * expected.abs().max()  # it is quantized


def dequantized(network: nn.Module) -> None:
    """Put the weights that quantized ones stand for in their place."""
    for layer in network.modules():
        for name, parameter in list(layer._parameters.items()):
            if parameter is not None and type(parameter) is not nn.Parameter:
                setattr(layer, name, nn.Parameter(parameter.dequantize(), requires_grad=False))


@WITH_TORCHAO
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_gradients_are_those_of_the_weights_as_they_are_quantized(kind: str, tmp_path: Path) -> None:
    """With respect to latents, which is what adjoints need, in the base and with an adapter above; and of the adapter."""
    place = saved("stable-diffusion-3", tmp_path)
    models = [from_diffusers(place, quantization={"transformer": kind}) for _ in range(2)]
    tuned = [with_adapter(model, rank=2) for model in models]
    with torch.no_grad():
        for model in tuned:
            for i, parameter in enumerate(model.flow.parameters()):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=stream(i, "adapter")))
    dequantized(tuned[1].denoiser.network)
    assert [is_quantized(model.denoiser.network) for model in tuned] == [True, False]
    x = latents_of(tuned[0], 2)
    cotangent, t = torch.randn(x.shape, generator=stream(1, "cotangent")), torch.tensor(0.4)
    found: list[list[Tensor]] = []
    for model in tuned:
        condition, _ = model.encode(PROMPTS[:2])
        pairs = [linearize(flow.bind(condition), x, t) for flow in (model.flow, model.base().flow)]
        values = [part for v, pullback in pairs for part in (v, pullback(cotangent))]
        loss = (model.flow.bind(condition)(x, t) * cotangent).sum()
        found.append([*values, *torch.autograd.grad(loss, list(model.flow.parameters()))])
    assert len(found[0]) > 12
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    assert (found[0][1] - found[0][3]).abs().max() > 1e-3  # the adapter is felt


METHODS: dict[str, dict[str, Any]] = {
    "adjoint-matching": {"num_inference_steps": 3},
    "score-as-action": {"preset": "ddpo", "num_inference_steps": 3},
}


@WITH_TORCHAO
@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_frozen_weights_as_they_are(method: str, tmp_path: Path) -> None:
    """Three updates from a recipe, in whose folder the adapter alone is; loaded again; and what its card draws in diffusers."""
    kinds = {"transformer": "int8", "text_encoder_3": "int8"}
    tree = recipe(tmp_path, quantization=kinds) | {"method": {"name": method, **METHODS[method]}}
    tree["evaluation"]["points"] = [{"num_inference_steps": 5, "guidance_scale": 2.5}]
    before = validate(Recipe, tree, "recipe").model.load("cpu")
    assert all(is_quantized(before.pipeline.components[name]) for name in kinds)
    summary = train(tree, tmp_path / "run")
    assert all(map(torch.isfinite, map(torch.tensor, (summary["reward_base"], summary["reward_tuned"]))))
    weights = load_file(tmp_path / "run" / "model" / "pytorch_lora_weights.safetensors")
    assert all("lora_" in name and tensor.dtype == torch.float32 for name, tensor in weights.items())
    tuned = load_text_to_image(tmp_path / "run")
    assert of_network(tuned.denoiser) == of_network(with_adapter(before, rank=2).denoiser)
    latents = torch.randn(2, *tuned.event_shape, generator=stream(0, "sample", 0))
    drawn = {"sampling": euler(5), "guidance_scale": 2.5, "latents": latents, "batch_size": 2}
    ours, base = (model.sample(["a red cat"] * 2, **drawn) for model in (tuned, tuned.base()))
    assert (ours - base).abs().max() > 1e-3
    result = export_run(tmp_path / "run", tmp_path / "exported")
    assert result["kind"] == "lora"
    card = (tmp_path / "exported" / "README.md").read_text()
    (tmp_path / "card.py").write_text(card.split("```python\n")[1].split("```")[0])
    torch.save(latents[:1], tmp_path / "latents.pt")
    arguments = [str(tmp_path / file) for file in ("card.py", "latents.pt", "image.pt")]
    path = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", SEPARATE, *arguments], check=True, cwd=tmp_path / "exported", env=path)
    image = torch.load(tmp_path / "image.pt", weights_only=True)
    assert (ours[:1].clamp(-1, 1) - (2 * image - 1)).abs().max() < 1e-4


@WITH_TORCHAO
def test_frozen_weights_through_a_training(tmp_path: Path) -> None:
    """Bit for bit, those of every tensor that quantized ones are stored in."""
    import tiltflow

    model = from_diffusers(saved("stable-diffusion-3", tmp_path), quantization={"transformer": "int8"}, height=16, width=16)

    def bits(model: TextToImage) -> dict[str, list[Tensor]]:
        named = model.denoiser.network.named_parameters()
        frozen = ((name.replace(".base_layer.", "."), parameter) for name, parameter in named if ".lora_" not in name)
        return {name: [part.clone() for part in stored(parameter.detach())] for name, parameter in frozen}

    before = bits(model)
    assert any(part.dtype == torch.int8 for parts in before.values() for part in parts)
    training = tiltflow.Training(max_train_steps=3, prompts_per_step=2, num_generations=2, guidance_mode="none")
    method = tiltflow.AdjointMatching(beta=0.02, num_inference_steps=3)
    tuned = tiltflow.tune(model, lambda images: images.mean((1, 2, 3)), method, training, conditions=PROMPTS[:2])
    after = bits(tuned)
    assert before.keys() == after.keys()
    assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))
    assert any(bool(p.abs().sum() > 0) for name, p in tuned.flow.named_parameters() if ".lora_B." in name)
    with pytest.raises(InputError, match="use an adapter"):
        from_diffusers(tmp_path / "stable-diffusion-3", quantization={"transformer": "int8"}).trainable()


@WITH_TORCHAO
def test_a_quantized_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its text encoders freed, on the CPU and kept."""
    monkeypatch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {})

    class Killed(BaseException):
        pass

    def watch(record: Any) -> None:
        if record.step == 2:
            raise Killed

    found = {}
    for use in ("free", "cpu", "keep"):
        tree = recipe(tmp_path, text_encoders=use, quantization={"transformer": "int8", "text_encoder": "int8"})
        tree["training"] |= {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
        if use == "cpu":
            with pytest.raises(Killed):
                run(validate(Recipe, tree, "recipe"), tmp_path / use, callbacks=[watch])
        train(tree, tmp_path / use)
        found[use] = load_file(tmp_path / use / "model" / "pytorch_lora_weights.safetensors")
    for weights in found.values():
        assert all(torch.equal(weights[name], tensor) for name, tensor in found["free"].items())


@WITH_TORCHAO
def test_the_doctor_counts_the_bytes_that_weights_are_kept_in(tmp_path: Path) -> None:
    findings = {}
    for kinds in ({}, {"transformer": "int8"}):
        patient = admit(validate(Recipe, recipe(tmp_path, quantization=kinds), "recipe"), "cpu")
        said = next(finding.text for finding in memory(patient) if finding.check == "memory")
        findings[bool(kinds)] = float(said.removeprefix("beside the weights, ").split(" MB")[0])
    network = validate(Recipe, recipe(tmp_path), "recipe").model.load("cpu").denoiser.network
    linear = sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, nn.Linear))
    saved_bytes = (findings[False] - findings[True]) * 2**20
    assert saved_bytes == pytest.approx(3 * linear, rel=0.3)  # of four bytes each, but for the scales


@WITH_TORCHAO
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_a_dora_above_quantized_weights(kind: str, tmp_path: Path) -> None:
    """It measures them as they are quantized: new, it changes nothing."""
    model = from_diffusers(saved("stable-diffusion-3", tmp_path), quantization={"transformer": kind})
    x, t = latents_of(model, 2), torch.tensor(0.4)
    condition, _ = model.encode(PROMPTS[:2])
    with torch.no_grad():
        before = model.flow.bind(condition)(x, t)
        tuned = with_adapter(model, rank=2, use_dora=True)
        after = tuned.flow.bind(condition)(x, t)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    gradients = torch.autograd.grad(tuned.flow.bind(condition)(x, t).square().sum(), list(tuned.flow.parameters()))
    assert any(bool(gradient.abs().sum() > 0) for gradient in gradients)


DISTANCE = {"int8": 0.003, "float8": 0.01, "nf4": 0.05}
"""Most that the velocities of `tiles-pipeline` move, as a share of their norm."""


def check_distance(kind: str) -> None:
    models = [from_diffusers("tiles-pipeline", quantization=kinds) for kinds in ({}, {"unet": kind})]
    prompts = ["potion on a white background", "armour on a black background"]
    x = latents_of(models[0], 2)
    with torch.no_grad():
        x1 = models[0].sample_latents(prompts, latents=x, guidance_scale=1.0, sampling=euler(10))
        whole, found = (
            torch.stack(
                [model.flow.bind(model.encode(prompts)[0])(t * x1 + (1 - t) * x, t) for t in torch.linspace(0.1, 0.9, 5)]
            )
            for model in models
        )
    assert DISTANCE[kind] / 10 < (found - whole).norm() / whole.norm() < DISTANCE[kind]


@WITH_TORCHAO
@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_how_far_eight_bits_move_velocities(kind: str) -> None:
    check_distance(kind)


# ---- bitsandbytes ----


@pytest.fixture
def diffusers_packs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: diffusers asks for one, and bitsandbytes has kernels for CPUs."""
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # its kernels take multiples of 32 alone
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda self, *arguments, **options: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda self, device_map: {"": "cpu"})


@WITH_BITSANDBYTES
@pytest.mark.usefixtures("diffusers_packs_on_a_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Latents are floats whatever the weights are packed in, and gradients are those of the weights that they stand for."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    place = saved("stable-diffusion-3", tmp_path)
    models = [with_adapter(from_diffusers(place, quantization={"transformer": "nf4"}, dtype=dtype), rank=2) for _ in range(2)]
    for layer in list(models[1].denoiser.network.modules()):
        for name, part in list(layer.named_children()):
            if isinstance(part, Linear4bit):
                plain = nn.Linear(part.in_features, part.out_features, part.bias is not None, dtype=dtype)
                plain.weight.data = dequantize_4bit(part.weight.data, part.weight.quant_state).to(dtype)
                plain.bias = part.bias
                setattr(layer, name, plain.requires_grad_(False))
    assert [is_quantized(model.denoiser.network) for model in models] == [True, False]
    assert floating_dtype(models[0].denoiser.network) == dtype
    x = latents_of(models[0], 2)
    found = []
    for model in models:
        condition, _ = model.encode(PROMPTS[:2])
        v, pullback = linearize(model.flow.bind(condition), x, torch.tensor(0.4))
        found.append((v, pullback(x)))
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() <= (1e-4 if dtype == torch.float32 else 2e-2) * other.abs().max()


@WITH_BITSANDBYTES
@pytest.mark.usefixtures("diffusers_packs_on_a_cpu")
def test_how_far_four_bits_move_velocities() -> None:
    check_distance("nf4")
