"""Families of pipelines: what was tuned, plain diffusers draws; a few updates of each method, with the critic of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
import diffusers
from peft import PeftModel
from tiny_pipelines import NEWER, tiny_pipeline

import tiltflow
from tiltflow import from_diffusers
from tiltflow.models.text_to_image import with_adapter
from tiltflow.samplers.sampling import Sampling

PROMPTS = ["a red cat", "two dogs on a sofa"]
FEW = {"num_inference_steps": 3}
METHODS = {
    "adjoint-matching": tiltflow.AdjointMatching(**FEW),
    "score-as-action": tiltflow.ScoreAsAction(**FEW, estimator="return-minus-value"),
    "orw-cfm-w2": tiltflow.OrwCfmW2(**FEW, num_passes=2, min_effective_sample_size=1),
}


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("name", NEWER)
def test_what_was_tuned_plain_diffusers_draws(name: str, tmp_path: Path) -> None:
    """From the files alone: the LoRA, the scheduler and the arguments of the call; and they are read back."""
    model = with_adapter(from_diffusers(tiny_pipeline(name, tmp_path), guidance_scale=2.0), rank=2)
    euler = Sampling(solver="euler", num_inference_steps=5)
    latents = torch.randn(2, *model.event_shape, generator=torch.Generator().manual_seed(0))
    before = model.sample(PROMPTS, sampling=euler, latents=latents)
    with torch.no_grad():
        for parameter in model.flow.parameters():  # type: ignore[union-attr]
            parameter += 0.1
    ours = model.sample(PROMPTS, sampling=euler, latents=latents)
    assert (ours - before).abs().max() > 1e-2
    model.save(tmp_path / "saved")

    pipeline = tiny_pipeline(name, tmp_path)
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(tmp_path / "saved")
    else:
        pipeline.transformer = PeftModel.from_pretrained(pipeline.transformer, tmp_path / "saved")
    for part in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        part.eval()  # as if it had been loaded from a folder
    config = json.loads((tmp_path / "saved" / "scheduler" / "scheduler_config.json").read_text())
    pipeline.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    sampling = json.loads((tmp_path / "saved" / "sampling.json").read_text())
    assert sampling.pop("pipeline") == type(pipeline).__name__
    theirs = pipeline(PROMPTS, latents=latents.clone(), num_inference_steps=5, output_type="pt", **sampling).images
    assert (ours.clamp(-1, 1) - (2 * theirs - 1)).abs().max() < 1e-4

    with torch.no_grad():
        for parameter in model.flow.parameters():  # type: ignore[union-attr]
            parameter *= 0
    model.load_weights(tmp_path / "saved")
    assert torch.equal(model.sample(PROMPTS, sampling=euler, latents=latents), ours)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NEWER)
def test_a_few_updates(name: str, method: str, tmp_path: Path) -> None:
    model, rows = from_diffusers(tiny_pipeline(name, tmp_path), guidance_scale=3.0), list[dict[str, Any]]()
    training = tiltflow.Training(max_train_steps=2, prompts_per_step=1, num_generations=4, guidance_mode="rollout")
    tuned = tiltflow.tune(
        model, brightness, METHODS[method], training, conditions=PROMPTS, callbacks=[lambda row: rows.append(row.metrics)]
    )
    assert rows[0].get("path_kl", 0) == 0
    assert all(row.get("critic_loss", 0) > 0 for row in rows) == (method == "score-as-action")
    moved = [p for name, p in tuned.denoiser.named_parameters() if p.requires_grad and "lora_B" in name]
    assert moved
    assert all(p.abs().max() > 0 for p in moved)


def test_an_instruction_counts_among_the_tokens(tmp_path: Path) -> None:
    """Of Lumina-Image 2.0, whose instruction is in front of every prompt: 256 tokens for both, here letters."""
    model = from_diffusers(tiny_pipeline("lumina2", tmp_path))
    room = 256 - len(model.pipeline.tokenizer(model.family.written(model.pipeline, "")).input_ids)
    model.encode(["a" * room])
    with pytest.warns(UserWarning, match="tokenizer takes 256 of its 257 tokens, the rest is not seen"):
        model.encode(["a" * (room + 1)])
