"""Stable Diffusion 1.x and 2.x: a U-Net with one text encoder, predicting epsilon or v."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

PIPELINE = "StableDiffusionPipeline"
DENOISER = "unet"
NEEDED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
TARGET_MODULES = ("to_k", "to_q", "to_v", "to_out.0")

Condition = dict[str, Tensor]


def default_size(pipeline: Any) -> tuple[int, int]:
    """Height and width in pixels."""
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


def latent_shape(pipeline: Any, height: int, width: int) -> tuple[int, ...]:
    """Of one sample, as the denoiser sees it."""
    return pipeline.unet.config.in_channels, height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor


def encode(
    pipeline: Any, prompts: list[str], size: tuple[int, int], *, negative_prompt: str | None = None
) -> tuple[Condition, Condition]:
    """The conditions of the prompts and the negative ones, each tensor [batch, ..]."""
    negatives = None if negative_prompt is None else [negative_prompt] * len(prompts)
    embeds, negative = pipeline.encode_prompt(prompts, pipeline.device, 1, True, negatives)
    return {"encoder_hidden_states": embeds}, {"encoder_hidden_states": negative}


def predictor(pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
    """(denoiser, x, timestep [batch], condition) -> its prediction."""
    return predict


def predict(unet: Any, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    out: Tensor = unet(x, timestep, **condition, return_dict=False)[0]
    return out


def unpack(pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """What the VAE decodes, [batch, channels, height, width]."""
    return latents / pipeline.vae.config.scaling_factor  # type: ignore[no-any-return]
