"""FLUX.1: a flow-matching transformer on 2x2 patches of latents, without negative prompts. dev was distilled to take the
guidance scale as an input; schnell has no guidance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tiltflow.models.pipelines import Condition, Family, TextOptions
from tiltflow.models.pipelines.stable_diffusion_3 import StableDiffusion3


class Flux(Family):
    """`FluxPipeline`. A state is a sequence of patches [tokens, channels]."""

    pipeline_class = "FluxPipeline"
    denoiser = "transformer"
    components: ClassVar[tuple[str, ...]] = (
        "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
    )  # fmt: skip
    target_modules: ClassVar[tuple[str, ...]] = StableDiffusion3.target_modules
    patch = 2
    guidance_scale = 3.5
    distilled = True
    max_sequence_length = 512

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        side = pipeline.default_sample_size * pipeline.vae_scale_factor
        return side, side

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, ...]:
        return self.image_tokens(pipeline, height, width), pipeline.transformer.config.in_channels

    def image_tokens(self, pipeline: Any, height: int, width: int) -> int:
        patch = self.patch * pipeline.vae_scale_factor
        return (height // patch) * (width // patch)  # type: ignore[no-any-return]

    def sigmas(self, num_inference_steps: int) -> Tensor:
        return torch.linspace(1.0, 1 / num_inference_steps, num_inference_steps, dtype=torch.float64)

    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition | None]:
        length = options.max_sequence_length or self.max_sequence_length
        embeds, pooled, _ = pipeline.encode_prompt(prompts, None, device=pipeline.device, max_sequence_length=length)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}, None

    def guidance_is_input(self, pipeline: Any) -> bool:
        return bool(pipeline.transformer.config.guidance_embeds)

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        return partial(predict, img_ids=self.places(pipeline, size))

    def places(self, pipeline: Any, size: tuple[int, int]) -> Tensor:
        """Return the coordinates [tokens, 3] of patches: of the picture, the row and the column."""
        patch = self.patch * pipeline.vae_scale_factor
        rows, columns = torch.meshgrid(torch.arange(size[0] // patch), torch.arange(size[1] // patch), indexing="ij")
        return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)

    def unpack(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        patch = self.patch * pipeline.vae_scale_factor
        return super().unpack(pipeline, unpatched(latents, size[0] // patch, size[1] // patch), size)


def unpatched(latents: Tensor, rows: int, columns: int) -> Tensor:
    """Return the latents [batch, channels, 2 rows, 2 columns] of patches [batch, rows x columns, 4 channels]."""
    channels = latents.shape[-1] // 4
    picture = latents.reshape(-1, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return picture.reshape(-1, channels, 2 * rows, 2 * columns)


def patched(latents: Tensor) -> Tensor:
    """Return the patches [batch, rows x columns, 4 channels] of latents [batch, channels, 2 rows, 2 columns]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).mT


def predict(transformer: Any, x: Tensor, time: Tensor, condition: Condition, *, img_ids: Tensor) -> Tensor:
    """Return the velocity from noise to data at times [batch]; the transformer's own time runs from data to noise."""
    txt_ids = x.new_zeros(condition["encoder_hidden_states"].shape[1], 3)
    away: Tensor = transformer(
        hidden_states=x, timestep=1 - time, img_ids=img_ids.to(x), txt_ids=txt_ids, **condition, return_dict=False
    )[0]
    return -away
