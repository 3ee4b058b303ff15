"""Stable Diffusion 3 and 3.5: a flow-matching transformer with three text encoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from tiltflow.models.pipelines import Condition, Family, TextOptions


class StableDiffusion3(Family):
    """`StableDiffusion3Pipeline`."""

    pipeline_class = "StableDiffusion3Pipeline"
    denoiser = "transformer"
    components: ClassVar[tuple[str, ...]] = (
        "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
    )  # fmt: skip
    target_modules: ClassVar[tuple[str, ...]] = (
        "to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    patch = 2
    max_sequence_length = 256

    def image_tokens(self, pipeline: Any, height: int, width: int) -> int:
        patch = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
        return (height // patch) * (width // patch)  # type: ignore[no-any-return]

    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition]:
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompts,
            prompts,
            prompts,
            device=pipeline.device,
            negative_prompt=options.negative_prompt,
            max_sequence_length=options.max_sequence_length or self.max_sequence_length,
        )
        return (
            {"encoder_hidden_states": embeds, "pooled_projections": pooled},
            {"encoder_hidden_states": negative, "pooled_projections": negative_pooled},
        )

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        return predict


def predict(transformer: Any, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Return the velocity from noise to data at times [batch]; the transformer's own time runs from data to noise, in
    thousandths."""
    away: Tensor = transformer(x, timestep=1000 * (1 - time), **condition, return_dict=False)[0]
    return -away
