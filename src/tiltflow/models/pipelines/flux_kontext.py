"""FLUX.1 Kontext: FLUX.1 that edits a picture, whose latents are appended to those that are drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tiltflow.models.pipelines import Condition
from tiltflow.models.pipelines.flux import Flux, patched, predict


class FluxKontext(Flux):
    """`FluxKontextPipeline`. A picture that is edited is resized to the size of those that are drawn, not to the nearest of the
    pipeline's preferred sizes, which are all of a million pixels."""

    pipeline_class = "FluxKontextPipeline"
    guidance_scale = 2.5
    edits = True

    def arguments(self, size: tuple[int, int], num_inference_steps: int) -> Mapping[str, Any]:
        return {"max_area": size[0] * size[1], "_auto_resize": False}

    def encode_pictures(self, pipeline: Any, pictures: Tensor, size: tuple[int, int]) -> Condition:
        vae = pipeline.vae
        encoded = vae.encode(pictures.to(vae.dtype))
        latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latents
        return {"image_latents": patched((latents - vae.config.shift_factor) * vae.config.scaling_factor)}

    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        places = self.places(pipeline, size)
        edited = places + torch.tensor([1, 0, 0])  # at the same rows and columns
        return partial(predict_edit, img_ids=torch.cat([places, edited]))


def predict_edit(transformer: Any, x: Tensor, time: Tensor, condition: Condition, *, img_ids: Tensor) -> Tensor:
    """Return the velocity from noise to data at times [batch], that of the picture that is edited left out."""
    texts = {key: value for key, value in condition.items() if key != "image_latents"}
    both = torch.cat([x, condition["image_latents"]], 1)
    return predict(transformer, both, time, texts, img_ids=img_ids)[:, : x.shape[1]]
