"""Qwen-Image: a flow-matching transformer on 2x2 patches of latents, prompts that a language model reads, and a decoder of
videos. A guided prediction keeps the norm of the unguided one, patch by patch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from tiltflow.models.pipelines import Condition, TextOptions
from tiltflow.models.pipelines.flux import Flux, unpatched


class QwenImage(Flux):
    """`QwenImagePipeline`. A state is a sequence of patches [tokens, channels]; prompts have their own lengths, and a mask."""

    pipeline_class = "QwenImagePipeline"
    components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    guidance_scale = 4.0
    guidance_keeps_norm = True
    distilled = False
    negative_prompt = " "  # without one the pipeline is not guided

    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition]:
        length = options.max_sequence_length or self.max_sequence_length

        def condition(texts: list[str]) -> Condition:
            embeds, mask = pipeline.encode_prompt(texts, device=pipeline.device, max_sequence_length=length)
            mask = embeds.new_ones(embeds.shape[:2]) if mask is None else mask
            return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}

        return condition(prompts), condition([options.negative_prompt or ""] * len(prompts))

    def written(self, pipeline: Any, prompt: str) -> str:
        after: str = pipeline.prompt_template_encode.split("{}")[1]
        return prompt + after  # what is before the prompt is not counted

    def guided_by(self, guidance_scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": guidance_scale}

    def guidance_is_input(self, pipeline: Any) -> bool:
        return False

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        patch = self.patch * pipeline.vae_scale_factor
        return partial(predict, rows=size[0] // patch, columns=size[1] // patch)

    def unpack(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        config, patch = pipeline.vae.config, self.patch * pipeline.vae_scale_factor
        mean, std = (latents.new_tensor(numbers)[:, None, None] for numbers in (config.latents_mean, config.latents_std))
        return (unpatched(latents, size[0] // patch, size[1] // patch) * std + mean)[:, :, None]

    def decode(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return super().decode(pipeline, latents, size)[:, :, 0]  # the only frame


def predict(transformer: Any, x: Tensor, time: Tensor, condition: Condition, *, rows: int, columns: int) -> Tensor:
    """Return the velocity from noise to data at times [batch]; the transformer's own time runs from data to noise."""
    shapes = [[(1, rows, columns)]] * len(x)
    away: Tensor = transformer(x, timestep=1 - time, img_shapes=shapes, **condition, return_dict=False)[0]
    return -away
