"""PixArt-Sigma: a diffusion transformer with T5 as its text encoder, predicting epsilon and a variance that no sampler uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from tiltflow.models.pipelines import Condition, Family, TextOptions


class PixartSigma(Family):
    """`PixArtSigmaPipeline`, without its binning of sizes and its cleaning of prompts, which depends on other packages."""

    pipeline_class = "PixArtSigmaPipeline"
    denoiser = "transformer"
    components = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    patch = 2
    guidance_scale = 4.5
    max_sequence_length = 300
    call: ClassVar[dict[str, Any]] = {"clean_caption": False, "use_resolution_binning": False}

    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition | None]:
        embeds, mask, negative, negative_mask = pipeline.encode_prompt(
            prompts,
            device=pipeline.device,
            negative_prompt=options.negative_prompt or "",
            max_sequence_length=options.max_sequence_length or self.max_sequence_length,
            **self.encoding(pipeline),
        )
        return (
            {"encoder_hidden_states": embeds, "encoder_attention_mask": mask},
            {"encoder_hidden_states": negative, "encoder_attention_mask": negative_mask},
        )

    def encoding(self, pipeline: Any) -> dict[str, Any]:
        """Return what else the pipeline's call passes to its text encoder."""
        return {}

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        return predict


def predict(transformer: Any, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
    """Return the prediction at timesteps [batch], without the channels of the learned variance."""
    options = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, **condition}
    out: Tensor = transformer(x, timestep=timestep, **options, return_dict=False)[0]
    return out[:, : x.shape[1]]
