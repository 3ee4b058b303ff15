"""Lumina-Image 2.0: a flow-matching transformer whose time runs from noise to data, and a language model that reads the prompt
behind an instruction. A guided prediction keeps the norm of the unguided one, row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from tiltflow.models.pipelines import Condition
from tiltflow.models.pipelines.flux import Flux
from tiltflow.models.pipelines.pixart_sigma import PixartSigma


class Lumina2(PixartSigma):
    """`Lumina2Pipeline`."""

    pipeline_class = "Lumina2Pipeline"
    guidance_scale = 4.0
    guidance_keeps_norm = True
    max_sequence_length = 256
    call: ClassVar[dict[str, Any]] = {}
    default_size = Flux.default_size
    sigmas = Flux.sigmas

    def image_tokens(self, pipeline: Any, height: int, width: int) -> int:
        return int(pipeline.transformer.config.in_channels)  # the pipeline takes the channels for the tokens

    def written(self, pipeline: Any, prompt: str) -> str:
        return f"{pipeline.system_prompt} <Prompt Start> {prompt}"

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        return predict


def predict(transformer: Any, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Return the velocity from noise to data at times [batch], as the transformer does."""
    mask = condition["encoder_attention_mask"].long()  # it counts the tokens of a prompt
    out: Tensor = transformer(x, timestep=time, **{**condition, "encoder_attention_mask": mask}, return_dict=False)[0]
    return out
