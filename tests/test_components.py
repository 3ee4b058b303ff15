"""Components of a pipeline from elsewhere, on small pipelines of the real classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
from diffusers import AutoencoderTiny, DDIMScheduler, EulerDiscreteScheduler
from safetensors.torch import save_file
from test_run_text_to_image import recipe_for
from test_text_to_image import PROMPTS, euler, latents_of, theirs
from tiny_pipelines import STABLE_DIFFUSION, stable_diffusion, tiny_pipeline, vae

from tiltflow import from_diffusers, load_text_to_image
from tiltflow.errors import InputError
from tiltflow.models.components import Place, place_of
from tiltflow.runs.export import export_run
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.settings import validate


def taesd() -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def other(seed: int, folder: Path) -> Any:
    """The tiny Stable Diffusion with other weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return stable_diffusion(folder / "tokenizer")


def equal(one: nn.Module, another: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), another.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_components_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its kind, as diffusers draws with the same; trained, loaded again, exported, and its files have fingerprints."""
    monkeypatch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {})
    tree, another = recipe_for(tmp_path, "stable-diffusion"), other(1, tmp_path)
    base, tiny = tiny_pipeline("stable-diffusion", tmp_path), taesd()
    another.save_pretrained(tmp_path / "another")
    tiny.save_pretrained(tmp_path / "taesd")
    save_file(another.unet.state_dict(), tmp_path / "unet.safetensors", {"format": "pt"})
    EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing").save_pretrained(tmp_path / "euler")
    tree["model"]["components"] = {
        "vae": str(tmp_path / "taesd"),
        "unet": str(tmp_path / "unet.safetensors"),
        "text_encoder": str(tmp_path / "another"),
        "scheduler": str(tmp_path / "euler"),
    }
    tree["model"] |= {"scheduler": {"use_karras_sigmas": True}, "vae_slicing": True}
    recipe = validate(Recipe, tree, "recipe")
    model = recipe.model.load("cpu")  # type: ignore[union-attr]
    assert isinstance(model.pipeline.vae, AutoencoderTiny)
    assert equal(model.pipeline.unet, another.unet)
    assert equal(model.pipeline.text_encoder, another.text_encoder)
    assert not equal(model.pipeline.text_encoder, base.text_encoder)
    base.register_modules(vae=tiny, unet=another.unet, text_encoder=another.text_encoder)
    base.scheduler = EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing="trailing", use_karras_sigmas=True)
    latents = latents_of(model)
    ours = model.sample(PROMPTS, sampling=euler(4), latents=latents, guidance_scale=3.0)
    expected = 2 * theirs(from_diffusers(base, height=16, width=16), latents, 4, 3.0, "pt") - 1
    assert (ours.clamp(-1, 1) - expected).abs().max() < 1e-4
    run(recipe, tmp_path / "run")
    tuned = load_text_to_image(tmp_path / "run")
    assert isinstance(tuned.pipeline.vae, AutoencoderTiny)
    assert torch.equal(tuned.base().sample(PROMPTS, sampling=euler(4), latents=latents, guidance_scale=3.0), ours)
    prints = json.loads((tmp_path / "run" / "fingerprints.json").read_text())
    assert {f"model.components.{name}" for name in tree["model"]["components"]} <= prints.keys()
    export_run(tmp_path / "run", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f'vae=AutoModel.from_pretrained("{tmp_path / "taesd"}")' in card
    assert f"The run had unet from {tmp_path / 'unet.safetensors'}, which this code does not load." in card
    assert "\npipeline.vae.enable_slicing()\n" in card
    assert "from diffusers import AutoModel, DiffusionPipeline, EulerDiscreteScheduler" in card
    another.vae.save_pretrained(tmp_path / "taesd")
    with pytest.raises(InputError, match=r"what model\.components\.vae names has changed"):
        load_text_to_image(tmp_path / "run")


def test_a_text_encoder_from_elsewhere_comes_back(tmp_path: Path) -> None:
    """And not that of the pipeline, once it was freed."""
    tiny_pipeline("stable-diffusion", tmp_path).save_pretrained(tmp_path / "base")
    other(1, tmp_path).save_pretrained(tmp_path / "another")
    components = {"text_encoder": tmp_path / "another", "unet": tmp_path / "another" / "unet", "vae": None}
    with pytest.raises(InputError, match="has no vae"):
        from_diffusers(tmp_path / "base", components=components)
    model = from_diffusers(tmp_path / "base", components={**components, "vae": tmp_path / "another"})
    expected = model.encode(PROMPTS)[0]["encoder_hidden_states"]
    model.encoder.encode_ahead(PROMPTS, model.device)
    model.encoder.cache.clear()
    assert torch.equal(model.encode(PROMPTS)[0]["encoder_hidden_states"], expected)


def test_components_in_their_dtypes(tmp_path: Path) -> None:
    tiny_pipeline("stable-diffusion", tmp_path).save_pretrained(tmp_path / "base")
    another = other(1, tmp_path)
    another.save_pretrained(tmp_path / "another")
    save_file(another.unet.state_dict(), tmp_path / "unet.safetensors", {"format": "pt"})
    model = from_diffusers(
        tmp_path / "base",
        dtype={"default": torch.bfloat16, "text_encoder": torch.float16},
        components={"vae": tmp_path / "another", "unet": tmp_path / "unet.safetensors", "text_encoder": tmp_path / "another"},
    )
    for name, dtype in (("vae", torch.float32), ("unet", torch.bfloat16), ("text_encoder", torch.float16)):
        assert equal(getattr(model.pipeline, name), getattr(another, name).to(dtype)), name


def test_where_components_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipelines = ("black-forest-labs/FLUX.1-dev",)
    monkeypatch.setattr("tiltflow.models.components._is_pipeline", lambda name: name in pipelines)
    assert place_of("vae", "madebyollin/taesd") == Place("madebyollin/taesd", "")
    assert place_of("vae", "owner/model/sub/vae") == Place("owner/model", "sub/vae")
    assert place_of("vae", pipelines[0]) == Place(pipelines[0], "vae")
    for wrong in ("taesd", str(tmp_path / "nowhere")):
        with pytest.raises(InputError, match="there is no such file or folder"):
            place_of("vae", wrong)
    (tmp_path / "weights.ckpt").write_bytes(b"a pickle, perhaps")
    with pytest.raises(InputError, match=r"must be a \.safetensors file"):
        place_of("vae", str(tmp_path / "weights.ckpt"))


def test_components_that_cannot_be(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("stable-diffusion", tmp_path)
    base = tmp_path / "base"
    pipeline.save_pretrained(base)
    vae(8).save_pretrained(tmp_path / "wide")
    DDIMScheduler().save_pretrained(tmp_path / "ddim")
    save_file(pipeline.text_encoder.state_dict(), tmp_path / "text.safetensors", {"format": "pt"})
    damaged = tmp_path / "damaged"
    pipeline.vae.save_pretrained(damaged)
    (damaged / "diffusion_pytorch_model.safetensors").write_bytes(b"not")
    hostile = tmp_path / "hostile"
    pipeline.vae.save_pretrained(hostile)
    config = json.loads((hostile / "config.json").read_text())
    (hostile / "config.json").write_text(json.dumps(config | {"layers_per_block": 10**9}))
    (tmp_path / "empty").mkdir()
    for components, message in (
        ({"vea": str(base)}, "model.components: StableDiffusionPipeline has no 'vea', did you mean 'vae'"),
        ({"vae": str(tmp_path / "ddim")}, r"model\.components\.vae .*ddim: cannot be loaded"),
        ({"scheduler": str(base / "vae")}, r"model\.components\.scheduler .*vae: cannot be loaded"),
        (
            {"text_encoder": str(tmp_path / "text.safetensors")},
            "CLIPTextModel is read from a folder alone, not from a single file",
        ),
        ({"vae": str(damaged)}, r"model\.components\.vae .*damaged: cannot be loaded"),
        ({"vae": str(hostile)}, "layers_per_block is 1000000000, and no model has more"),
        ({"vae": str(tmp_path / "empty")}, r"model\.components\.vae .*empty: cannot be loaded"),
    ):
        with pytest.raises(InputError, match=message):
            from_diffusers(base, components=components)
    with pytest.raises(InputError, match="a pipeline that is given has its own"):
        from_diffusers(pipeline, components={"vae": str(base)})
    tree = recipe_for(tmp_path, "stable-diffusion")
    tree["model"]["components"] = {"vae": str(tmp_path / "wide")}
    with pytest.raises(InputError, match="the pipeline's decoder raised"):
        run(validate(Recipe, tree, "recipe"), tmp_path / "run")
    tree["model"]["components"] = {"scheduler": None}
    with pytest.raises(InputError, match="has no scheduler"):
        run(validate(Recipe, tree, "recipe"), tmp_path / "run")
