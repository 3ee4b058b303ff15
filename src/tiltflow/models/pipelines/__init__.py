"""Families of diffusers pipelines, one file each: what is particular to a class of pipelines.

File `stable_diffusion_3.py` has the class `StableDiffusion3`, a `Family`. Another package adds one by an entry point of the
group `tiltflow.models.pipelines` that names such a module. `docs/text-to-image.md` shows a whole one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from tiltflow import plugins
from tiltflow.errors import InputError, did_you_mean

Condition = dict[str, Any]
"""Keyword arguments of a denoiser: tensors [batch, ..], or mappings of tensors."""


@dataclass(frozen=True)
class TextOptions:
    """Settings of the text encoders.

    Args:
        negative_prompt: prompt that guidance leads away from; None is the pipeline's default.
        max_sequence_length: number of tokens that T5 sees; None is the family's default.
    """

    negative_prompt: str | None = None
    max_sequence_length: int | None = None


class Family(ABC):
    """What is particular to a class of diffusers pipelines. It has no state; pipelines are passed to its methods."""

    pipeline_class: ClassVar[str]
    """Name of the class of diffusers."""
    denoiser: ClassVar[str]
    """Name of the component that is tuned."""
    components: ClassVar[tuple[str, ...]]
    """Names of the components that a pipeline must have."""
    target_modules: ClassVar[tuple[str, ...]]
    """Ends of the names of the layers that a LoRA adapts by default: the attention."""
    patch: ClassVar[int] = 1
    """Height and width are multiples of this many latents."""
    guidance_scale: ClassVar[float] = 7.5
    """Default guidance scale."""
    distilled: ClassVar[bool] = False
    """True if there are no negative prompts: the guidance scale is an input of the network, or there is no guidance."""
    max_sequence_length: ClassVar[int | None] = None
    """Default number of tokens that T5 sees; None if its number is not a setting."""
    call: ClassVar[Mapping[str, Any]] = {}
    """Arguments of the pipeline's call without which it would draw other pictures than we do; exports name them."""
    negative_prompt: ClassVar[str | None] = None
    """Default negative prompt, for a pipeline that is guided only if it is given one."""
    negative_prompts: ClassVar[bool] = True
    """False if guidance leads away from the empty prompt, and from no other."""
    num_frames: ClassVar[int | None] = None
    """Default number of frames of a video; None for a family of pictures."""
    edits: ClassVar[bool] = False
    """True if each prompt comes with a picture, of which `encode_pictures` makes a part of the condition."""
    guidance_keeps_norm: ClassVar[bool] = False
    """True if a guided prediction gets the norm of the unguided one, along the last axis of a state."""

    @abstractmethod
    def encode(
        self, pipeline: Any, prompts: list[str], size: tuple[int, int], options: TextOptions
    ) -> tuple[Condition, Condition | None]:
        """Encode prompts: (conditions, negative conditions or None), each tensor [batch, ..]."""

    def encode_pictures(self, pipeline: Any, pictures: Tensor, size: tuple[int, int]) -> Condition:
        """Return what the denoiser sees of pictures [batch, 3, height, width], of the size of those that are drawn, in [-1, 1]:
        tensors [batch, ..] of other names than those of `encode`."""
        raise NotImplementedError

    @abstractmethod
    def predictor(self, pipeline: Any, size: tuple[int, int]) -> Callable[..., Tensor]:
        """Return the function (denoiser, x [batch, *event], time [batch], condition) -> prediction [batch, *event].

        For flow matching, time runs from t = 0, noise, to t = 1, data, and the prediction is the velocity in that direction;
        for diffusion, time is the timestep, and the prediction what the scheduler says.
        """

    def check(self, index: Mapping[str, Any]) -> None:  # noqa: B027
        """Raise InputError for a pipeline of the class that is not supported, by its model_index.json, before its weights are
        loaded."""

    def scale_factor(self, pipeline: Any) -> int:
        """Return the height and width, in pixels, of one latent."""
        return pipeline.vae_scale_factor  # type: ignore[no-any-return]

    def default_size(self, pipeline: Any) -> tuple[int, int]:
        """Return the default height and width of the pictures in pixels."""
        size = getattr(pipeline, self.denoiser).config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, ...]:
        """Return the shape [*event] of the latents of one picture, as the denoiser sees them."""
        factor = self.scale_factor(pipeline)
        return getattr(pipeline, self.denoiser).config.in_channels, height // factor, width // factor

    def video_shape(self, pipeline: Any, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Return the shape [*event] of the latents of one video, where `num_frames` has a default. Raises InputError for a
        number of frames that the pipeline does not take."""
        raise NotImplementedError

    def unpack(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the input of the VAE's decoder, [batch, channels, height, width], for latents [batch, *event]."""
        config = pipeline.vae.config
        scaled: Tensor = latents / config.scaling_factor
        return scaled if config.get("shift_factor") is None else scaled + config.shift_factor

    def written(self, pipeline: Any, prompt: str) -> str:
        """Return the text of which `max_sequence_length` tokens are seen: a prompt, and what the pipeline writes around it."""
        return prompt

    def decode(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the pictures [batch, 3, height, width] of latents [batch, *event], about [-1, 1], or videos [batch, frames, 3,
        height, width]."""
        unpacked = self.unpack(pipeline, latents, size)
        pictures: Tensor = pipeline.vae.decode(unpacked.to(pipeline.vae.dtype), return_dict=False)[0]
        return pictures

    def returned(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the latents [batch, *event] of those that the pipeline returns, which may be of another form."""
        return latents

    def arguments(self, size: tuple[int, int], num_inference_steps: int) -> Mapping[str, Any]:
        """Return `call`, where that depends on the size of the pictures or the number of steps."""
        return self.call

    def is_distilled(self, pipeline: Any) -> bool:
        """Return `distilled`, where that is not the same for all pipelines of the class."""
        return self.distilled

    def guided_by(self, guidance_scale: float) -> dict[str, Any]:
        """Return the arguments with which the pipeline is guided as we are by a scale of 1, none, or more."""
        return {"guidance_scale": guidance_scale}

    def guidance_is_input(self, pipeline: Any) -> bool:
        """Return whether the network takes the guidance scale as the condition `guidance`."""
        return False

    def image_tokens(self, pipeline: Any, height: int, width: int) -> int:
        """Return the number of tokens of a picture, on which dynamic shifting depends."""
        return 0

    def sigmas(self, num_inference_steps: int) -> Tensor | None:
        """Return the sigmas [num_inference_steps] that the pipeline passes to its scheduler; None if it passes none."""
        return None

    def shift(self, image_tokens: int, num_inference_steps: int) -> float | None:
        """Return mu, by which a scheduler with dynamic shifting shifts; None if it is linear in the tokens, as it says."""
        return None


@cache
def _family(name: str) -> Family:
    found: Family = plugins.find("models.pipelines", name)()
    return found


def families() -> dict[str, Family]:
    """Return all families by the names of their pipeline classes."""
    return {family.pipeline_class: family for family in map(_family, plugins.names("models.pipelines"))}


def family_named(name: str, known: Mapping[str, Family]) -> Family:
    """Return the family of a class of pipelines. Raises InputError, which names the nearest or all, if there is none."""
    if name in known:
        return known[name]
    raise InputError(
        f"pipeline {name} is not known{did_you_mean(name, known)}; docs/text-to-image.md shows how to add a family"
    )
