"""SANA: a flow-matching transformer with linear attention on latents of 32 channels, and a small language model that reads the
prompt behind an instruction."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from tiltflow.models.pipelines import Condition
from tiltflow.models.pipelines.pixart_sigma import PixartSigma


class Sana(PixartSigma):
    """`SanaPipeline`, without its binning of sizes."""

    pipeline_class = "SanaPipeline"
    patch = 1
    call: ClassVar[dict[str, Any]] = {"use_resolution_binning": False}

    def encoding(self, pipeline: Any) -> dict[str, Any]:
        # the instruction is a default of the call, not of what encodes
        instruction = "complex_human_instruction"
        return {instruction: inspect.signature(type(pipeline).__call__).parameters[instruction].default}

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        return predict


def predict(transformer: Any, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
    """Return the velocity from noise to data at times [batch]; the transformer's own time runs from data to noise, in
    thousandths."""
    timestep = 1000 * (1 - time) * transformer.config.timestep_scale
    away: Tensor = transformer(x, timestep=timestep, **condition, return_dict=False)[0]
    return -away[:, : x.shape[1]]
