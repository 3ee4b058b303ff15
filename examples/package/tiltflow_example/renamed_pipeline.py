"""A family of pipelines: Stable Diffusion in a class of another name, tuned in its cross-attention alone."""

from tiltflow.models.pipelines.stable_diffusion import StableDiffusion


class RenamedPipeline(StableDiffusion):
    """A subclass of diffusers' `StableDiffusionPipeline`."""

    pipeline_class = "RenamedPipeline"
    target_modules = ("attn2.to_k", "attn2.to_v")
