"""FLUX.1: a flow-matching transformer on 2x2 patches of latents. dev was distilled to take the guidance scale as an input, so
there is no negative prompt; schnell takes none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tiltflow.models.pipelines import stable_diffusion_3
from tiltflow.models.pipelines.stable_diffusion_3 import Condition

PIPELINE = "FluxPipeline"
DENOISER = "transformer"
NEEDED = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
TARGET_MODULES = stable_diffusion_3.TARGET_MODULES


def default_size(pipeline: Any) -> tuple[int, int]:
    """Height and width in pixels."""
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    return side, side


def latent_shape(pipeline: Any, height: int, width: int) -> tuple[int, ...]:
    """Of one sample, as the denoiser sees it: a row of patches."""
    return image_tokens(pipeline, height, width), pipeline.transformer.config.in_channels


def image_tokens(pipeline: Any, height: int, width: int) -> int:
    """How many tokens a picture is: what dynamic shifting depends on."""
    patch = 2 * pipeline.vae_scale_factor
    return (height // patch) * (width // patch)  # type: ignore[no-any-return]


def sigmas(num_inference_steps: int) -> Tensor:
    """What the pipeline asks its scheduler for."""
    return torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64)


def encode(
    pipeline: Any, prompts: list[str], size: tuple[int, int], *, max_sequence_length: int = 512
) -> tuple[Condition, None]:
    """The conditions of the prompts, each tensor [batch, ..]; there are no negative ones."""
    embeds, pooled, _ = pipeline.encode_prompt(prompts, None, device=pipeline.device, max_sequence_length=max_sequence_length)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}, None


def distilled_guidance(pipeline: Any) -> bool:
    """Whether the guidance scale is an input of the network."""
    return bool(pipeline.transformer.config.guidance_embeds)


def predictor(pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
    """(denoiser, x, time [batch], condition) -> the velocity from noise to data."""
    patch = 2 * pipeline.vae_scale_factor
    rows, columns = torch.meshgrid(torch.arange(size[0] // patch), torch.arange(size[1] // patch), indexing="ij")
    return partial(predict, img_ids=torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3))


def predict(transformer: Any, x: Tensor, time: Tensor, condition: Condition, *, img_ids: Tensor) -> Tensor:
    txt_ids = x.new_zeros(condition["encoder_hidden_states"].shape[1], 3)
    # the pipeline's time runs from data to noise
    away: Tensor = transformer(
        hidden_states=x, timestep=1 - time, img_ids=img_ids.to(x), txt_ids=txt_ids, **condition, return_dict=False
    )[0]
    return -away


def unpack(pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """What the VAE decodes, [batch, channels, height, width]."""
    patch = 2 * pipeline.vae_scale_factor
    rows, columns = size[0] // patch, size[1] // patch
    channels = latents.shape[-1] // 4
    picture = latents.reshape(-1, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    picture = picture.reshape(-1, channels, 2 * rows, 2 * columns)
    return picture / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor  # type: ignore[no-any-return]
