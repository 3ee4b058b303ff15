"""Lumina-Image 2.0: a flow-matching transformer whose time runs from noise to data, and a language model that reads the prompt
behind an instruction. A guided prediction keeps the norm of the unguided one, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tiltflow.models.pipelines import Condition, Family, TextOptions


class Lumina2(Family):
    """`Lumina2Pipeline`."""

    pipeline_class = "Lumina2Pipeline"
    denoiser = "transformer"
    components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    patch = 2
    guidance_scale = 4.0
    guidance_keeps_norm = True
    max_sequence_length = 256

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        side = pipeline.default_sample_size * pipeline.vae_scale_factor
        return side, side

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, ...]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def image_tokens(self, pipeline: Any, height: int, width: int) -> int:
        return int(pipeline.transformer.config.in_channels)  # the pipeline takes the channels for the tokens

    def sigmas(self, num_inference_steps: int) -> Tensor:
        return torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64)

    def written(self, pipeline: Any, prompt: str) -> str:
        return f"{pipeline.system_prompt} <Prompt Start> {prompt}"

    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition]:
        embeds, mask, negative, negative_mask = pipeline.encode_prompt(
            prompts,
            device=pipeline.device,
            negative_prompt=options.negative_prompt,
            max_sequence_length=options.max_sequence_length or self.max_sequence_length,
        )
        return (
            {"encoder_hidden_states": embeds, "encoder_attention_mask": mask},
            {"encoder_hidden_states": negative, "encoder_attention_mask": negative_mask},
        )

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        return predict

    def unpack(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        config = pipeline.vae.config
        return latents / config.scaling_factor + config.shift_factor  # type: ignore[no-any-return]


def predict(transformer: Any, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Return the velocity from noise to data at times [batch], as the transformer does."""
    mask = condition["encoder_attention_mask"].long()  # it counts the tokens of a prompt
    out: Tensor = transformer(x, timestep=time, **{**condition, "encoder_attention_mask": mask}, return_dict=False)[0]
    return out
