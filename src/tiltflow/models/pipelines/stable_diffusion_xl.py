"""Stable Diffusion XL: a U-Net with two text encoders, told the size of the picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiltflow.models.pipelines.stable_diffusion import TARGET_MODULES, default_size, latent_shape, predictor

PIPELINE = "StableDiffusionXLPipeline"
DENOISER = "unet"
NEEDED = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")

__all__ = [
    "DENOISER", "NEEDED", "PIPELINE", "TARGET_MODULES",
    "default_size", "encode", "latent_shape", "predictor", "unpack",
]  # fmt: skip


def encode(
    pipeline: Any, prompts: list[str], size: tuple[int, int], *, negative_prompt: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The conditions of the prompts and the negative ones, each tensor [batch, ..]."""
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompts, device=pipeline.device, negative_prompt=negative_prompt
    )
    time_ids = torch.tensor([[*size, 0, 0, *size]], device=embeds.device, dtype=embeds.dtype).expand(len(prompts), -1)

    def condition(embeds: Tensor, pooled: Tensor) -> dict[str, Any]:
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}

    return condition(embeds, pooled), condition(negative, negative_pooled)


def unpack(pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """What the VAE decodes, [batch, channels, height, width]."""
    config = pipeline.vae.config
    scaled: Tensor = latents / config.scaling_factor
    mean, std = (getattr(config, key, None) for key in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return scaled
    return scaled * scaled.new_tensor(std)[:, None, None] + scaled.new_tensor(mean)[:, None, None]
