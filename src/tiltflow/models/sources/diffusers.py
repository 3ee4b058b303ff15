"""A pipeline of diffusers: a folder, or a name in tiltflow or on the hub."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field

from tiltflow.errors import InputError, did_you_mean
from tiltflow.models.from_diffusers import from_diffusers
from tiltflow.models.pipeline_files import load_pipeline
from tiltflow.models.pipeline_folder import check_numbers
from tiltflow.models.text_to_image import TextToImage
from tiltflow.models.trainable import Adapter
from tiltflow.settings import PathOrName, Settings
from tiltflow.user_code import refused

Count = Annotated[int, Field(ge=1)]


class Lora(Settings):
    """A LoRA that the model has before it is tuned."""

    path: PathOrName
    """A file, a folder, or a name on the hub, as `pipeline.load_lora_weights` reads it, in safetensors."""
    strength: float = 1.0
    """What its output is multiplied with."""


class Diffusers(Settings):
    """A pipeline of diffusers."""

    name: Literal["diffusers"] = "diffusers"
    diffusers: PathOrName
    """A folder, or a name: in tiltflow, `tiles-pipeline`, or on the hub."""
    revision: str | None = None
    """Of a model on the hub: a branch, a tag or a commit."""
    variant: str | None = None
    """Of its files, such as fp16."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """dtype of the frozen weights; the adapter, the decoder and the mathematics are in float32."""
    height: Count | None = None
    """Of the pictures, in pixels; the pipeline's own by default."""
    width: Count | None = None
    """Of the pictures, in pixels; the pipeline's own by default."""
    guidance_scale: Annotated[float, Field(ge=1)] | None = None
    """By default 7.5, or 3.5 where it is an input of the network."""
    negative_prompt: str | None = None
    """What guidance leads away from; nothing, or the empty prompt, by default, as the pipeline has it."""
    max_sequence_length: Count | None = None
    """Tokens of a prompt that T5 sees, where there is one; by default the pipeline's own number."""
    without: tuple[str, ...] = ()
    """Parts of the pipeline that are not loaded: text_encoder_3, the T5 of Stable Diffusion 3, which it can do without."""
    loras: tuple[Lora, ...] = ()
    """LoRAs that are loaded first, and stay below the adapter, in base and tuned alike."""
    adapter: Adapter | None = Adapter()
    """null tunes the whole denoiser, beside a frozen copy."""
    scheduler: dict[str, Any] = Field(default_factory=dict)
    """Settings of the pipeline's scheduler to change, such as `timestep_spacing: trailing`."""
    gradient_checkpointing: bool = False
    """Compute activations once more on the way back: less memory, a third more time."""

    prompted: ClassVar[bool] = True

    @property
    def title(self) -> str:
        """The name of the model, as a report says it."""
        return self.diffusers

    def load_tuned(self, base: TextToImage, folder: Path, seed: int) -> tuple[TextToImage, TextToImage]:
        """(base, tuned) of a run whose tuned model lies in `folder`; with an adapter they share their network.

        Raises InputError if it is not there, or is another."""
        untuned, tuned = base.trainable(self.adapter, seed=seed)
        tuned.load_weights(folder)
        return untuned, tuned

    def keep(self, folder: Path) -> None:
        """Nothing is copied: a pipeline is large, and is had again where it was had."""

    def bytes_to_keep(self, folder: Path) -> int:
        """0."""
        return 0

    def kept_in(self, folder: Path) -> Diffusers:
        """The same: nothing is copied."""
        return self

    def load(self, device: str) -> TextToImage:
        """The untuned model. Raises InputError if it cannot be had."""
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        options |= {key: value for key in ("revision", "variant") if (value := getattr(self, key)) is not None}
        options |= dict.fromkeys(self.without)
        pipeline = load_pipeline(self.diffusers, options)
        for part in self.without:
            if part not in pipeline.components:
                raise InputError(
                    f"model.without: {type(pipeline).__name__} has no {part!r}{did_you_mean(part, pipeline.components)}"
                )
        load_loras(pipeline, self.loras)
        own = pipeline.scheduler.config
        for key in self.scheduler:
            if key not in own:
                raise InputError(f"model.scheduler: {type(pipeline.scheduler).__name__} has no {key!r}{did_you_mean(key, own)}")
        check_numbers(self.scheduler, "model.scheduler")
        with refused("model.scheduler: is refused"):
            pipeline.scheduler = type(pipeline.scheduler).from_config(own, **self.scheduler)
        given = ("height", "width", "guidance_scale", "negative_prompt", "max_sequence_length")
        model = from_diffusers(pipeline, device=device, **{key: getattr(self, key) for key in given})
        if self.gradient_checkpointing:
            cast(Any, model.denoiser.network).enable_gradient_checkpointing()
        return model


def load_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Load LoRAs into a pipeline, and switch them on. Raises InputError for what cannot be had, or is of another model."""
    if not loras:
        return
    names = [f"lora_{i}" for i in range(len(loras))]
    for i, (name, lora) in enumerate(zip(names, loras, strict=True)):
        with refused(f"model.loras.{i}.path {lora.path}: cannot be loaded"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # it is wanted
            pipeline.load_lora_weights(lora.path, adapter_name=name, use_safetensors=True)
    with refused("model.loras: do not fit the pipeline"):
        pipeline.set_adapters(names, [lora.strength for lora in loras])
