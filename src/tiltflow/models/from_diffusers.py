"""A diffusers pipeline becomes a model: checks it, freezes it, and reads its family, size, schedule and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.models.denoiser import Denoiser
from tiltflow.models.few_steps import own_sampling
from tiltflow.models.pipeline_files import load_pipeline
from tiltflow.models.pipelines import Family, TextOptions, families, family_named
from tiltflow.models.prompt_encoder import CACHE_GB, PromptEncoder
from tiltflow.models.schedules import schedule_of
from tiltflow.models.text_encoders import Load, TextEncoders, Use
from tiltflow.models.text_to_image import TextToImage, checked_scale
from tiltflow.user_code import check_device, refused


@refused("pipeline: cannot be tuned")
def from_diffusers(
    pipeline_or_path: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    max_sequence_length: int | None = None,
    device: torch.device | str = "cpu",
    text_encoders: Use | None = None,
    prompt_cache_gb: float = CACHE_GB,
    components: Mapping[str, str | Path | None] | None = None,
    quantization: Mapping[str, str] | None = None,
    vae_tiling: bool = False,
    vae_slicing: bool = False,
    **options: Any,
) -> TextToImage:
    """Make a model of a text-to-image pipeline of diffusers: a pipeline, its folder, or its name, in tiltflow or on the hub.

    Args:
        height, width: of the pictures, in pixels; the pipeline's own by default.
        num_frames: of a video, where the pipeline draws videos; the pipeline's own by default.
        guidance_scale: that of the family by default, such as 7.5, and 1 where the scheduler is for few steps; 1 or less is no
            guidance, in every family.
        negative_prompt: prompt that guidance leads away from; the empty prompt or zeros by default, as in diffusers.
        max_sequence_length: number of tokens of a prompt that T5 sees, where there is one; the pipeline's own by default.
        text_encoders: `free` frees them once a training has encoded its prompts, and loads them again for a new one; `cpu`
            keeps them on the CPU, and `keep` on the device. By default `free` for a path or a name, and `keep` for a pipeline.
        prompt_cache_gb: gigabytes of conditions that are kept, on the CPU, for prompts that come again.
        components: what is loaded from elsewhere, by the names of components: a folder, a name on the hub, a single file; None
            is not loaded at all.
        quantization: nf4, int8 or float8, in which frozen weights are kept, of components by their names, such as
            {"transformer": "int8"}; the denoiser is then tuned by an adapter only.
        vae_tiling, vae_slicing: the decoder works on overlapping tiles, or on one picture at a time; as in diffusers.
        options: of `DiffusionPipeline.from_pretrained`, such as `revision`, `variant` and `dtype`: float32 by default, and of
            components by their names in {"default": torch.bfloat16, "text_encoder": torch.float32}.

    The decoder is in float32 unless `dtype` names it. Weights are read from safetensors only, and no code of the repository is
    run.

    Raises InputError if there is no such pipeline, if its class is not supported, if a component is missing, or for a size, a
    guidance scale or a setting of the text encoders that it does not take.
    """
    check_device(device)
    pipeline, load = pipeline_or_path, None
    if isinstance(pipeline_or_path, (str, Path)):
        pipeline, load = loaded(pipeline_or_path, options, components, quantization)
    elif components or quantization:
        what = "components" if components else "quantization"
        raise InputError(f"{what}: a pipeline that is given has its own; give its path, or load it so")
    return model_of(
        pipeline,
        load,
        device,
        text_encoders=text_encoders,
        prompt_cache_gb=prompt_cache_gb,
        height=height,
        width=width,
        num_frames=num_frames,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        max_sequence_length=max_sequence_length,
        vae_tiling=vae_tiling,
        vae_slicing=vae_slicing,
    )


def loaded(
    path: str | Path,
    options: Mapping[str, Any],
    components: Mapping[str, str | Path | None] | None,
    quantization: Mapping[str, str] | None,
) -> tuple[Any, Load]:
    """Load a pipeline; see `load_pipeline`. Returns it, and what loads its text encoders again."""
    sources = {name: None if source is None else str(source) for name, source in (components or {}).items()}

    def load(there: Mapping[str, Any]) -> Any:
        return load_pipeline(path, {**options, **there}, sources, quantization)

    return load({}), load


def model_of(
    pipeline: Any,
    load: Load | None,
    device: torch.device | str,
    *,
    text_encoders: Use | None,
    prompt_cache_gb: float,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    guidance_scale: float | None,
    negative_prompt: str | None,
    max_sequence_length: int | None,
    vae_tiling: bool,
    vae_slicing: bool,
) -> TextToImage:
    """Make a model of a pipeline; see `from_diffusers`.

    Args:
        load: loads its text encoders again; None if they cannot be.
    """
    if not prompt_cache_gb > 0:
        raise InputError(f"prompt_cache_gb {prompt_cache_gb!r}: must be a number of gigabytes above 0")
    encoders = TextEncoders(pipeline, text_encoders or ("keep" if load is None else "free"), load)
    family = family_of(pipeline)
    size = size_of(pipeline, family, height, width)
    frames = frames_of(pipeline, family, num_frames, size)
    check_options(pipeline, family, TextOptions(negative_prompt, max_sequence_length))
    encoding = TextOptions(family.negative_prompt if negative_prompt is None else negative_prompt, max_sequence_length)
    freeze(pipeline, encoders, device)
    set_up_decoder(pipeline.vae, tiling=vae_tiling, slicing=vae_slicing)
    few = own_sampling(pipeline, family)
    own_scale = 1.0 if few is not None and not family.is_distilled(pipeline) else family.guidance_scale
    scale = own_scale if guidance_scale is None else checked_scale(guidance_scale)
    schedule = schedule_of(pipeline.scheduler, family.image_tokens(pipeline, *size), family.sigmas, family.shift)
    denoiser = Denoiser(getattr(pipeline, family.denoiser), schedule.called(family.predictor(pipeline, size)))
    flow = Flow(denoiser, schedule.prediction, schedule.path)
    encoder = PromptEncoder(pipeline, family, size, encoding, encoders, prompt_cache_gb * 2**30)
    model = TextToImage(pipeline, family, flow, size, scale, schedule, encoder, num_frames=frames)
    if few is None:
        schedule.warn_of_difference(min(model.sampling.num_inference_steps, schedule.own.config.num_train_timesteps // 2))
    else:
        model = replace(model, sampling=few)
    if guidance_scale is not None and not model.takes_guidance:
        raise InputError("guidance_scale: this model was distilled without guidance and takes none; leave it out")
    return model


def family_of(pipeline: Any) -> Family:
    """Return the family of a pipeline. Raises InputError if its class is not supported or a component is missing."""
    name = type(pipeline).__name__
    family = family_named(name, families())
    if missing := [part for part in family.components if getattr(pipeline, part, None) is None]:
        raise InputError(f"pipeline {name}: has no {missing[0]}")
    family.check(pipeline.config)
    return family


def size_of(pipeline: Any, family: Family, height: int | None, width: int | None) -> tuple[int, int]:
    """Return height and width in pixels, the pipeline's own by default. Raises InputError if they are no multiples of a
    patch."""
    own = family.default_size(pipeline)
    size = (own[0] if height is None else height, own[1] if width is None else width)
    factor = family.scale_factor(pipeline) * family.patch
    if any(side < 1 or side % factor for side in size):
        raise InputError(f"height and width must be multiples of {factor}, got {size[0]} and {size[1]}")
    return size


def frames_of(pipeline: Any, family: Family, num_frames: int | None, size: tuple[int, int]) -> int | None:
    """Return the number of frames of a video, the family's own by default; None for pictures. Raises InputError for a number
    that the pipeline does not take."""
    if family.num_frames is None:
        if num_frames is not None:
            raise InputError(f"num_frames: pipeline {type(pipeline).__name__} draws pictures; leave it out")
        return None
    frames = family.num_frames if num_frames is None else num_frames
    family.video_shape(pipeline, frames, *size)
    return frames


def check_options(pipeline: Any, family: Family, encoding: TextOptions) -> None:
    """Raise InputError for settings of the text encoders that a pipeline does not take."""
    name = type(pipeline).__name__
    takes_one = family.negative_prompts and not family.is_distilled(pipeline)
    if encoding.negative_prompt is not None and not takes_one:
        raise InputError(f"negative_prompt: pipeline {name} takes none; leave it out")
    if encoding.max_sequence_length is not None and family.max_sequence_length is None:
        raise InputError(f"max_sequence_length: pipeline {name} takes none; leave it out")


def freeze(pipeline: Any, encoders: TextEncoders, device: torch.device | str) -> None:
    """Move a pipeline to a device, in eval mode, without gradients and progress bars, in place; the decoder of one that was not
    loaded here in float32."""
    encoders.move(device)
    if encoders.load is None and pipeline.vae.dtype != torch.float32:
        pipeline.vae.to(torch.float32)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)


def set_up_decoder(vae: Any, *, tiling: bool, slicing: bool) -> None:
    """Decode in tiles or slices, and recompute the activations of a decoder, block by block, where it has gradients: half the
    memory, with the same bits. Raises InputError for an autoencoder that has no tiles or slices."""
    for name, wanted in (("tiling", tiling), ("slicing", slicing)):
        if wanted:
            with refused(f"model.vae_{name}: {type(vae).__name__} has none"):
                getattr(vae, f"enable_{name}")()
    if getattr(vae, "_supports_gradient_checkpointing", False):
        vae.enable_gradient_checkpointing()
