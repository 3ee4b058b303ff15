"""Latent consistency models: Stable Diffusion distilled to few steps, with the guidance scale as an input of its U-Net."""

from __future__ import annotations

from tiltflow.models.pipelines.stable_diffusion import StableDiffusion


class LatentConsistency(StableDiffusion):
    """`LatentConsistencyModelPipeline`."""

    pipeline_class = "LatentConsistencyModelPipeline"
    guidance_scale = 8.5
