"""Stable Diffusion 1.x and 2.x: a U-Net with one text encoder, predicting epsilon or v."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from tiltflow.models.pipelines import Condition, Family, TextOptions


class StableDiffusion(Family):
    """`StableDiffusionPipeline`."""

    pipeline_class = "StableDiffusionPipeline"
    denoiser = "unet"
    components: ClassVar[tuple[str, ...]] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    target_modules = ("to_k", "to_q", "to_v", "to_out.0")

    def guidance_is_input(self, pipeline: Any) -> bool:
        return pipeline.unet.config.get("time_cond_proj_dim") is not None  # as of latent consistency models

    def is_distilled(self, pipeline: Any) -> bool:
        return self.guidance_is_input(pipeline)

    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition | None]:
        negatives = None if options.negative_prompt is None else [options.negative_prompt] * len(prompts)
        embeds, negative = pipeline.encode_prompt(prompts, pipeline.device, 1, True, negatives)
        away = None if self.is_distilled(pipeline) else {"encoder_hidden_states": negative}
        return {"encoder_hidden_states": embeds}, away

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        return predict


def predict(unet: Any, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """Return the prediction of the U-Net at timesteps [batch]."""
    if (scale := condition.get("guidance")) is not None:
        condition = {key: value for key, value in condition.items() if key != "guidance"}
        condition["timestep_cond"] = sinusoids(scale.float() - 1, unet.config.time_cond_proj_dim).to(x.dtype)
    out: Tensor = unet(x, timestep, **condition, return_dict=False)[0]
    return out


def sinusoids(scale: Tensor, width: int) -> Tensor:
    """Return the embedding [batch, width] of guidance scales less 1 [batch], as latent consistency models were trained."""
    half = width // 2
    rates = (torch.arange(half, device=scale.device) * (-math.log(10_000) / (half - 1))).exp()
    angles = 1000 * scale[:, None] * rates
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))
