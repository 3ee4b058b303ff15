"""SANA-Sprint: SANA distilled to one to four steps, with the guidance scale as an input of its network. What its pipeline
computes in angles is a velocity on the linear path, and its scheduler's steps are those of the solver `consistency` there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from tiltflow.models.pipelines import Condition, TextOptions
from tiltflow.models.pipelines.sana import Sana

TWO_STEPS = 1.3
"""The angle between both of two steps, the default of the pipeline; other numbers of steps are spread evenly."""


class SanaSprint(Sana):
    """`SanaSprintPipeline`, without its binning of sizes."""

    pipeline_class = "SanaSprintPipeline"
    distilled = True

    def arguments(self, size: tuple[int, int], num_inference_steps: int) -> Mapping[str, Any]:
        return {**self.call, "intermediate_timesteps": TWO_STEPS if num_inference_steps == 2 else None}

    def guidance_is_input(self, pipeline: Any) -> bool:
        return True

    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition | None]:
        length = options.max_sequence_length or self.max_sequence_length
        embeds, mask = pipeline.encode_prompt(
            prompts, device=pipeline.device, max_sequence_length=length, **self.encoding(pipeline)
        )
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}, None

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        return predict_sprint


def predict_sprint(transformer: Any, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Return the velocity from noise to data at times [batch]."""
    guidance = condition["guidance"] * transformer.config.guidance_embeds_scale
    away: Tensor = transformer(x, timestep=1 - time, **{**condition, "guidance": guidance}, return_dict=False)[0]
    return -away
