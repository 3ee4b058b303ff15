"""Z-Image: a flow-matching transformer in one stream of prompt and picture, and prompts that a language model reads. Its
pipeline counts guidance from 0, where ours is 1; the Turbo models are distilled and want none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tiltflow.models.pipelines import Condition, TextOptions
from tiltflow.models.pipelines.flux import Flux
from tiltflow.models.pipelines.flux_2_klein import chat
from tiltflow.models.pipelines.stable_diffusion_3 import StableDiffusion3


class ZImage(StableDiffusion3):
    """`ZImagePipeline`. Prompts have their own lengths, and a mask."""

    pipeline_class = "ZImagePipeline"
    components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    guidance_scale = 6.0
    max_sequence_length = 512
    sigmas = Flux.sigmas
    image_tokens = Flux.image_tokens

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        return 1024, 1024

    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition]:
        length, away = options.max_sequence_length or self.max_sequence_length, [options.negative_prompt or ""] * len(prompts)
        both = pipeline.encode_prompt(list(prompts), device=pipeline.device, negative_prompt=away, max_sequence_length=length)

        def condition(embeds: list[Tensor]) -> Condition:
            masks = [part.new_ones(len(part)) for part in embeds]
            return {"prompts": pad_sequence(embeds, batch_first=True), "mask": pad_sequence(masks, batch_first=True)}

        return condition(both[0]), condition(both[1])

    def written(self, pipeline: Any, prompt: str) -> str:
        return chat(pipeline.tokenizer, prompt, enable_thinking=True)

    def guided_by(self, guidance_scale: float) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale - 1}

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        return predict


def predict(transformer: Any, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Return the velocity from noise to data at times [batch], which are the transformer's own."""
    lengths = (condition["mask"] > 0).sum(1).tolist()
    prompts = [prompt[:length] for prompt, length in zip(condition["prompts"], lengths, strict=True)]
    pictures: list[Tensor] = transformer(list(x[:, :, None]), time, prompts, return_dict=False)[0]
    return torch.stack(pictures)[:, :, 0]
