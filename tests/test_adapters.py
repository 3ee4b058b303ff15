"""Adapters of pipelines: DoRA and rank-stabilised LoRA by their formulas, exported to plain diffusers, and LoRAs that go on."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_run_text_to_image import recipe_for, train
from test_text_to_image import PROMPTS, euler, latents_of, theirs
from tiny_pipelines import tiny_pipeline

from tiltflow import Adapter, AdjointMatching, Training, from_diffusers, load, load_text_to_image, tune
from tiltflow.errors import InputError
from tiltflow.models.text_to_image import TextToImage, with_adapter
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.settings import validate
from tiltflow.streams import stream

OTHER_FAMILIES = [pytest.param(name, marks=pytest.mark.slow) for name in ("stable-diffusion-3", "flux", "pixart-sigma", "sana")]


def moved(model: TextToImage, size: float = 0.3) -> TextToImage:
    """Another adapter, as if trained: magnitudes longer, all else drawn anew."""
    generator = stream(0, "adapter")
    with torch.no_grad():
        for name, parameter in model.flow.named_parameters():
            drawn = size * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter * drawn.exp() if "magnitude" in name else drawn)
    return model


def velocity(model: TextToImage) -> Tensor:
    condition, _ = model.encode(PROMPTS)
    with torch.no_grad():
        return model.flow.bind(condition)(latents_of(model), torch.tensor(0.4))


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("settings", [{"use_dora": True, "lora_alpha": 3}, {"use_rslora": True, "lora_alpha": 3}])
def test_the_weights_that_an_adapter_stands_for(settings: dict[str, Any], tmp_path: Path) -> None:
    """By the papers (arXiv 2402.09353, eq. 5; 2312.03732): a plain pipeline with these weights has the same velocities."""
    model = moved(with_adapter(from_diffusers(tiny_pipeline("stable-diffusion", tmp_path)), rank=4, **settings))
    plain = from_diffusers(tiny_pipeline("stable-diffusion", tmp_path))
    trained, count = dict(model.flow.named_parameters()), 0
    for name, layer in plain.denoiser.network.named_modules():
        key = f"network.{name}.lora_A.default.weight"
        if key not in trained:
            continue
        scale = 3 / 2 if "use_rslora" in settings else 3 / 4  # alpha over the root of the rank, or over the rank
        change = scale * trained[key.replace("lora_A", "lora_B")] @ trained[key]
        whole = layer.weight + change.reshape(layer.weight.shape)
        if "use_dora" in settings:
            lengths = trained[key.replace("lora_A", "lora_magnitude_vector")]
            whole = whole * (lengths / whole.square().sum(1).sqrt())[:, None]
        layer.weight = nn.Parameter(whole.detach(), requires_grad=False)
        count += 1
    assert count > 3
    base = velocity(model.base())
    assert distance(velocity(model), velocity(plain)) < 1e-5
    assert distance(velocity(model), base) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_dora_changes_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    """Not by the rounding of its magnitudes either, to the dtype of the weights that it measures."""
    model = from_diffusers(tiny_pipeline("stable-diffusion", tmp_path).to(dtype))
    before = velocity(model)
    tuned = with_adapter(model, use_dora=True)
    assert {parameter.dtype for parameter in tuned.flow.parameters()} == {torch.float32}
    assert distance(velocity(tuned), before) < 1e-6
    network = tuned.denoiser.network
    layer = next(layer for layer in network.modules() if hasattr(layer, "lora_magnitude_vector"))
    lengths = layer.get_base_layer().weight.float().square().sum(1).sqrt()
    assert torch.allclose(layer.lora_magnitude_vector["default"].weight, lengths, rtol=1e-6)


@pytest.mark.parametrize("name", ["stable-diffusion", *OTHER_FAMILIES])
@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, pytest.param({"use_rslora": True, "rank": 4, "lora_alpha": 2}, marks=pytest.mark.slow)]
)
def test_plain_diffusers_draws_with_what_is_saved(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Their scale and their magnitudes are in the file."""
    model = moved(with_adapter(from_diffusers(tiny_pipeline(name, tmp_path)), **settings), 0.1)
    model.save(tmp_path / "saved")
    plain = tiny_pipeline(name, tmp_path)
    if hasattr(plain, "load_lora_weights"):
        plain.load_lora_weights(tmp_path / "saved")
    else:
        plain.transformer = PeftModel.from_pretrained(plain.transformer, tmp_path / "saved")
    for part in plain.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    latents = latents_of(model)
    expected = theirs(replace(model, pipeline=plain), latents, 4, 2.0)
    found, base = (
        one.sample_latents(PROMPTS, sampling=euler(4), guidance_scale=2.0, latents=latents) for one in (model, model.base())
    )
    assert distance(found, expected) < 1e-4
    assert distance(found, base) > 1e-3


# ---- a LoRA that goes on ----


def lora(folder: Path, name: str = "stable-diffusion", **settings: Any) -> Path:
    moved(with_adapter(from_diffusers(tiny_pipeline(name, folder)), **settings), 0.1).save(folder / "lora")
    return folder / "lora"


@pytest.mark.parametrize("name", ["stable-diffusion", *OTHER_FAMILIES])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_training_goes_on_from_a_lora(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """From its weights, not rounded to the dtype of the network, with its rank, scale and layers; the base is without it."""
    settings = {"rank": 3, "lora_alpha": 2, "use_rslora": True, "target_modules": ["to_q", "to_out.0"]}
    place = lora(tmp_path, name, **settings)
    pipeline = tiny_pipeline(name, tmp_path).to(dtype)
    model = from_diffusers(pipeline)
    before = velocity(model)
    tuned = with_adapter(model, continue_from=str(place))
    other = moved(with_adapter(from_diffusers(tiny_pipeline(name, tmp_path).to(dtype)), **settings), 0.1)
    here, there = dict(tuned.flow.named_parameters()), dict(other.flow.named_parameters())
    assert here.keys() == there.keys()
    assert all(torch.equal(here[key], there[key]) and here[key].dtype == torch.float32 for key in here)
    assert torch.equal(velocity(tuned.base()), before)
    assert distance(velocity(tuned), velocity(other)) < 1e-6
    assert distance(velocity(tuned), before) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kohya", "older diffusers"])
def test_loras_of_other_programs_go_on(kind: str, tmp_path: Path) -> None:
    """With the alphas that Kohya's scripts write into the file; and what is saved goes on again."""
    weights, others = load_file(lora(tmp_path, rank=4) / "pytorch_lora_weights.safetensors"), {}
    for name, tensor in weights.items():
        layer, part = name.removeprefix("unet.").rsplit(".lora_", 1)
        side = "down" if part[0] == "A" else "up"
        if kind == "kohya":
            layer = "lora_unet_" + layer.replace(".", "_")
            others |= {f"{layer}.lora_{side}.weight": tensor, f"{layer}.alpha": torch.tensor(2.0)}
        else:
            others[f"unet.{layer}.lora.{side}.weight"] = tensor
    save_file(others, tmp_path / "other.safetensors")
    alpha = 2 if kind == "kohya" else 4
    wanted = moved(with_adapter(from_diffusers(tiny_pipeline("stable-diffusion", tmp_path)), rank=4, lora_alpha=alpha), 0.1)
    place = tmp_path / "other.safetensors"
    for _ in range(2):
        found = with_adapter(from_diffusers(tiny_pipeline("stable-diffusion", tmp_path)), continue_from=str(place))
        assert distance(velocity(found), velocity(wanted)) < 1e-6
        place = tmp_path / "again"
        found.save(place)


@pytest.mark.slow
def test_a_lora_goes_on_above_another(tmp_path: Path) -> None:
    """The one below is a part of the base and is not trained."""
    place = lora(tmp_path, rank=2)
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    torch.manual_seed(3)
    pipeline.unet.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_k"]), "style")
    model = from_diffusers(pipeline)
    before, style = velocity(model), {n: p.clone() for n, p in pipeline.unet.named_parameters() if ".style." in n}
    training = Training(max_train_steps=2, prompts_per_step=1, num_generations=2, guidance_mode="none")
    method = AdjointMatching(beta=0.1, num_inference_steps=2)
    tuned = tune(model, brightness, method, training, conditions=["a cat"], adapter=Adapter(continue_from=str(place)))
    assert torch.equal(velocity(tuned.base()), before)
    assert all(torch.equal(p, style[n]) for n, p in pipeline.unet.named_parameters() if n in style)
    with pytest.warns(UserWarning, match="trained on top of 'style'"):
        tuned.save(tmp_path / "tuned")
    weights, start = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (tmp_path / "tuned", place))
    assert weights.keys() == start.keys()
    assert any((weights[key] - start[key]).abs().max() > 0 for key in start)


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def test_what_cannot_go_on(tmp_path: Path) -> None:
    tree = recipe_for(tmp_path, "stable-diffusion")
    source = {key: value for key, value in tree["model"].items() if key != "adapter"}
    for adapter, message in (
        ({"continue_from": "mine", "rank": 8}, "rank: the LoRA that adapter.continue_from names has its own; leave it out"),
        ({"continue_from": "mine", "use_dora": True}, "use_dora: the LoRA that adapter.continue_from names has its own"),
    ):
        with pytest.raises(InputError, match=message):
            validate(Recipe, {**tree, "model": {**source, "adapter": adapter}}, "recipe")
    for method in ({"name": "orw-cfm-w2"}, {"name": "tilt-matching", "beta": 0.1}):
        changed = {**tree, "model": {**source, "adapter": {"continue_from": "mine"}}, "method": method, "optimizer": {}}
        with pytest.raises(InputError, match=f"{method['name']} counts its law from the base"):
            run(validate(Recipe, changed, "recipe"), tmp_path / "run")
    model = from_diffusers(tmp_path / "stable-diffusion")
    with pytest.raises(InputError, match=r"adapter.continue_from .*nowhere: cannot be loaded"):
        with_adapter(model, continue_from=str(tmp_path / "nowhere"))
    pipeline, config = tiny_pipeline("stable-diffusion", tmp_path), LoraConfig(r=2, target_modules=["q_proj"])
    pipeline.text_encoder.add_adapter(config)
    layers = {f"text_encoder.{key}": value for key, value in get_peft_model_state_dict(pipeline.text_encoder).items()}
    save_file(layers, tmp_path / "of_text.safetensors")
    message = "has weights of text_encoder, and the unet alone is trained; model.loras takes them all"
    with pytest.raises(InputError, match=message):
        with_adapter(model, continue_from=str(tmp_path / "of_text.safetensors"))
    assert not hasattr(model.denoiser.network, "peft_config")
    with pytest.raises(InputError, match="LoRAs of pipelines are continued, and this model is a network"):
        load("digits-flow").trainable(Adapter(continue_from="mine"))


def test_layers_that_no_adapter_has(tmp_path: Path) -> None:
    """Those of text encoders, before anything is loaded and in Python, and a wrong name beside right ones, which peft leaves
    out."""
    tree = recipe_for(tmp_path, "stable-diffusion")
    for name in ("text_encoder.q_proj", "text_encoder_2"):
        tree["model"] |= {"adapter": {"target_modules": ["to_q", name]}}
        message = f"adapter.target_modules: '{name}': text encoders are not tuned, the denoiser alone is"
        with pytest.raises(InputError, match=message) as refused:
            validate(Recipe, tree, "recipe")
        assert len(str(refused.value).splitlines()) == 1
        with pytest.raises(InputError, match=message):
            with_adapter(from_diffusers(tmp_path / "stable-diffusion"), target_modules=["to_q", name])
    message = r"no layer's name ends with 'attn1.to_w', did you mean 'attn1.to_\w'?"
    with pytest.raises(InputError, match=message):
        with_adapter(from_diffusers(tmp_path / "stable-diffusion"), target_modules=["to_q", "attn1.to_w"])
    with pytest.raises(InputError, match="no layer's name ends with 'nowhere'"):
        load("digits-flow").trainable(Adapter(target_modules=("nowhere",)))


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a recipe; its tuned model is loaded from the run alone, and it is resumed bit for bit."""
    monkeypatch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {})
    place = lora(tmp_path, rank=3, use_dora=True)
    tree = recipe_for(tmp_path, "stable-diffusion")
    tree["model"]["adapter"] = {"continue_from": str(place)}
    tree["training"] |= {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}

    class Killed(BaseException):
        pass

    def watch(record: Any) -> None:
        if record.step == 2:
            raise Killed

    train(tree, tmp_path / "whole")
    with pytest.raises(Killed):
        run(validate(Recipe, tree, "recipe"), tmp_path / "parts", callbacks=[watch])
    train(tree, tmp_path / "parts")
    weights = [load_file(tmp_path / one / "model" / "pytorch_lora_weights.safetensors") for one in ("whole", "parts")]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    whole = load_text_to_image(tmp_path / "whole")
    trained = {key.removeprefix("network."): value for key, value in whole.flow.named_parameters()}
    assert all(
        any(torch.equal(tensor, parameter) for parameter in trained.values() if parameter.shape == tensor.shape)
        for tensor in weights[0].values()
    )
    before = {key: parameter.clone() for key, parameter in trained.items()}
    shutil.rmtree(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be compared with what the run began from
        again = load_text_to_image(tmp_path / "whole")
    for key, parameter in again.flow.named_parameters():
        assert torch.equal(parameter, before[key.removeprefix("network.")])
