"""Stable Diffusion 3 and 3.5: a flow-matching transformer with three text encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

PIPELINE = "StableDiffusion3Pipeline"
DENOISER = "transformer"
NEEDED = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
TARGET_MODULES = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")

Condition = dict[str, Tensor]


def default_size(pipeline: Any) -> tuple[int, int]:
    """Height and width in pixels."""
    side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    return side, side


def latent_shape(pipeline: Any, height: int, width: int) -> tuple[int, ...]:
    """Of one sample, as the denoiser sees it."""
    factor = pipeline.vae_scale_factor
    return pipeline.transformer.config.in_channels, height // factor, width // factor


def image_tokens(pipeline: Any, height: int, width: int) -> int:
    """How many tokens a picture is: what dynamic shifting depends on."""
    patch = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
    return (height // patch) * (width // patch)  # type: ignore[no-any-return]


def encode(
    pipeline: Any,
    prompts: list[str],
    size: tuple[int, int],
    *,
    negative_prompt: str | None = None,
    max_sequence_length: int = 256,
) -> tuple[Condition, Condition]:
    """The conditions of the prompts and the negative ones, each tensor [batch, ..]."""
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompts,
        prompts,
        prompts,
        device=pipeline.device,
        negative_prompt=negative_prompt,
        max_sequence_length=max_sequence_length,
    )
    return (
        {"encoder_hidden_states": embeds, "pooled_projections": pooled},
        {"encoder_hidden_states": negative, "pooled_projections": negative_pooled},
    )


def predictor(pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
    """(denoiser, x, time [batch], condition) -> the velocity from noise to data."""
    return predict


def predict(transformer: Any, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    # the pipeline's time runs from data to noise, in thousandths
    away: Tensor = transformer(x, timestep=1000 * (1 - time), **condition, return_dict=False)[0]
    return -away


def unpack(pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """What the VAE decodes, [batch, channels, height, width]."""
    return latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor  # type: ignore[no-any-return]
