"""Stable Diffusion XL: a U-Net with two text encoders that is conditioned on the size of the picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiltflow.models.pipelines import Condition, TextOptions
from tiltflow.models.pipelines.stable_diffusion import StableDiffusion


class StableDiffusionXl(StableDiffusion):
    """`StableDiffusionXLPipeline`."""

    pipeline_class = "StableDiffusionXLPipeline"
    components = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")

    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition | None]:
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompts, device=pipeline.device, negative_prompt=options.negative_prompt
        )
        time_ids = torch.tensor([[*size, 0, 0, *size]], device=embeds.device, dtype=embeds.dtype).expand(len(prompts), -1)

        def condition(embeds: Tensor, pooled: Tensor) -> Condition:
            return {"encoder_hidden_states": embeds, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}

        return condition(embeds, pooled), None if self.is_distilled(pipeline) else condition(negative, negative_pooled)

    def unpack(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        config, scaled = pipeline.vae.config, super().unpack(pipeline, latents, size)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return scaled
        return scaled * scaled.new_tensor(std)[:, None, None] + scaled.new_tensor(mean)[:, None, None]
