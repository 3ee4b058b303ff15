"""Wan 2.1, and Wan 2.2 of one transformer: a flow-matching transformer on latents of videos, and T5 as its text encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.models.pipelines import Condition, Family, TextOptions
from tiltflow.models.pipelines.pixart_sigma import PixartSigma
from tiltflow.models.pipelines.stable_diffusion_3 import predict


class Wan(Family):
    """`WanPipeline`. A state is a video of latents [channels, frames, height, width], of which the first frame is that of the
    video, and each later one several of its frames.

    With `expand_timesteps` the pipeline tells its transformer the time of each token, which is the same for all of them.
    """

    pipeline_class = "WanPipeline"
    denoiser = "transformer"
    components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    target_modules = PixartSigma.target_modules
    patch = 2
    num_frames = 81
    guidance_scale = 5.0
    max_sequence_length = 512

    def check(self, index: Mapping[str, Any]) -> None:
        if any(index.get("transformer_2") or ()) or index.get("boundary_ratio") is not None:
            raise InputError(
                f"pipeline {self.pipeline_class}: has a second transformer, for clear videos (transformer_2, boundary_ratio),"
                " as Wan 2.2-A14B; supported are pipelines of one transformer, as Wan 2.1 and Wan 2.2-TI2V-5B"
            )

    def scale_factor(self, pipeline: Any) -> int:
        return pipeline.vae_scale_factor_spatial  # type: ignore[no-any-return]

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        return 480, 832  # the defaults of the pipeline's call, as its number of frames

    def video_shape(self, pipeline: Any, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        each = pipeline.vae_scale_factor_temporal
        if num_frames % each != 1 % each or num_frames < 1:
            near = max(1, num_frames - 1) // each * each + 1
            raise InputError(
                f"num_frames {num_frames}: must be a multiple of {each} and 1 more, such as {near} or {near + each}"
            )
        channels, *picture = self.latent_shape(pipeline, height, width)
        return channels, 1 + (num_frames - 1) // each, *picture

    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition]:
        embeds, negative = pipeline.encode_prompt(
            prompts,
            negative_prompt=options.negative_prompt,
            max_sequence_length=options.max_sequence_length or self.max_sequence_length,
            device=pipeline.device,
        )
        return {"encoder_hidden_states": embeds}, {"encoder_hidden_states": negative}

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        return predict

    def unpack(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        config = pipeline.vae.config
        mean, std = (latents.new_tensor(numbers)[:, None, None, None] for numbers in (config.latents_mean, config.latents_std))
        return latents * std + mean

    def decode(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return super().decode(pipeline, latents, size).transpose(1, 2)
