"""FLUX.2-klein: FLUX.2 with another language model. Its base models are guided away from the empty prompt; the others were
distilled to few steps and take no guidance."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tiltflow.models.pipelines import Condition, TextOptions
from tiltflow.models.pipelines.flux_2 import Flux2, moments


class Flux2Klein(Flux2):
    """`Flux2KleinPipeline`. The pipeline's configuration says which it is, by `is_distilled`."""

    pipeline_class = "Flux2KleinPipeline"
    distilled = False
    negative_prompts = False

    def is_distilled(self, pipeline: Any) -> bool:
        return bool(pipeline.config.is_distilled)

    def guidance_is_input(self, pipeline: Any) -> bool:
        return False

    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition | None]:
        condition, _ = super().encode(pipeline, prompts, size, options)
        away = None if self.is_distilled(pipeline) else super().encode(pipeline, [""] * len(prompts), size, options)[0]
        return condition, away

    def written(self, pipeline: Any, prompt: str) -> str:
        return chat(pipeline.tokenizer, prompt, enable_thinking=False)

    def returned(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        patches = F.pixel_unshuffle(latents, 2)
        mean, std = moments(pipeline.vae, patches)
        return (patches - mean) / std


def chat(tokenizer: Any, prompt: str, *, enable_thinking: bool) -> str:
    """Return a prompt as the beginning of a chat."""
    messages = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
    )
    return text
