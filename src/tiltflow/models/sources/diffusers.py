"""A diffusers pipeline, from a folder or, by name, of tiltflow or the hub."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast, get_args

import torch
from pydantic import Field, field_validator, model_validator

from tiltflow.errors import InputError, did_you_mean
from tiltflow.models.attention import set_attention_backend
from tiltflow.models.from_diffusers import family_of, loaded, model_of
from tiltflow.models.pipeline_adapter import denoiser_alone
from tiltflow.models.pipeline_folder import check_numbers
from tiltflow.models.prompt_encoder import CACHE_GB
from tiltflow.models.quantization import PACKAGES, Quantization
from tiltflow.models.text_encoders import Load, Use
from tiltflow.models.text_to_image import TextToImage
from tiltflow.models.trainable import Adapter
from tiltflow.settings import PathOrName, Settings
from tiltflow.user_code import refused

Count = Annotated[int, Field(ge=1)]


Dtype = Literal["float32", "float16", "bfloat16"]


class Lora(Settings):
    """A LoRA that is loaded into the base model."""

    path: PathOrName
    """File, folder, or name on the hub, as `pipeline.load_lora_weights` reads it, in safetensors."""
    strength: float = 1.0
    """Factor of its output."""


class Diffusers(Settings):
    """A diffusers pipeline."""

    name: Literal["diffusers"] = "diffusers"
    diffusers: PathOrName
    """Folder, or name: of a pipeline that ships with tiltflow, `tiles-pipeline`, or of one on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    variant: str | None = None
    """Variant of its files, such as fp16."""
    dtype: Dtype | dict[str, Dtype] = "float32"
    """dtype of the frozen weights, or of components by their names: {default: bfloat16, vae: float32}. The adapter, all
    computations outside the networks, and the vae unless it is named, are in float32."""
    height: Count | None = None
    """Height of the pictures in pixels; the pipeline's own by default."""
    width: Count | None = None
    """Width of the pictures in pixels; the pipeline's own by default."""
    num_frames: Count | None = None
    """Number of frames of a video, where the pipeline draws videos; the pipeline's own by default."""
    guidance_scale: Annotated[float, Field(ge=1)] | None = None
    """Scale of classifier-free guidance, or the input of a network that was distilled from it; that of the family by default,
    such as 7.5."""
    negative_prompt: str | None = None
    """Prompt that guidance leads away from; the pipeline's own, the empty prompt or zeros, by default."""
    max_sequence_length: Count | None = None
    """Number of tokens of a prompt that T5 sees, where there is one; the pipeline's own by default."""
    text_encoders: Use = "free"
    """What becomes of the text encoders, with the same results: free, once all prompts are encoded; cpu, they encode there;
    keep, they stay on the device."""
    prompt_cache_gb: Annotated[float, Field(gt=0)] = CACHE_GB
    """Gigabytes of memory, on the CPU, for the encoded prompts; those that were used least recently are encoded again."""
    components: dict[str, PathOrName | None] = Field(default_factory=dict)
    """Components from elsewhere, by their names: {vae: madebyollin/taesd}, {transformer: mine.safetensors}, a folder or that of
    another pipeline; null is not loaded, such as text_encoder_3, the T5 of Stable Diffusion 3, which is optional."""
    quantization: dict[str, Quantization] = Field(default_factory=dict)
    """Frozen weights that are kept in fewer bits, of the denoiser and the text encoders by their names: {transformer: nf4}, by
    bitsandbytes on a GPU, or int8 or float8, by torchao. With an adapter alone, which is in float32, as is all else."""
    without: tuple[str, ...] = ()
    """Components that are not loaded: the same as null in `components`."""
    loras: tuple[Lora, ...] = ()
    """LoRAs that are loaded first, and are active below the adapter in both the base and the tuned model."""
    adapter: Adapter | None = Adapter()
    """LoRA that is trained in the frozen denoiser; null trains a copy of the whole denoiser."""
    scheduler: dict[str, Any] = Field(default_factory=dict)
    """Changed settings of the pipeline's scheduler, such as `timestep_spacing: trailing`."""
    vae_tiling: bool = False
    """Decode in overlapping tiles, as diffusers does: less memory, and slightly other pictures."""
    vae_slicing: bool = False
    """Decode one picture at a time, as diffusers does; `training.decode_batch_size` is the same where there are gradients."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    attention_backend: str | None = None
    """Implementation of the denoiser's attention, by diffusers' names, such as flash, _native_cudnn or xformers; its own by
    default. Not every denoiser has a choice."""

    prompted: ClassVar[bool] = True

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtypes(cls, value: Any) -> Any:
        known = get_args(Dtype)
        for one in value.values() if isinstance(value, dict) else [value]:
            if one not in known:
                raise ValueError(f"{one!r} must be {', '.join(known)}{did_you_mean(str(one), known)}")
        return value

    @field_validator("quantization", mode="before")
    @classmethod
    def _kinds(cls, value: Any) -> Any:
        for name, kind in value.items() if isinstance(value, dict) else ():
            if kind not in PACKAGES:
                raise ValueError(f"{name}: {kind!r} must be {', '.join(PACKAGES)}{did_you_mean(str(kind), PACKAGES)}")
        return value

    @model_validator(mode="after")
    def _only_adapters(self) -> Diffusers:
        if self.quantization and self.adapter is None:
            raise ValueError("quantization: quantized weights are frozen; give an adapter, not null")
        denoiser_alone(self.adapter)
        return self

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtypes of components by their names, and of all others as `default`."""
        return {"default": "float32", **self.dtype} if isinstance(self.dtype, dict) else {"default": self.dtype}

    @property
    def replaced(self) -> dict[str, str | None]:
        """Where components come from that are not the pipeline's own; None if they are not loaded."""
        return {**dict.fromkeys(self.without), **self.components}

    @property
    def title(self) -> str:
        """Name of the model in a report."""
        return self.diffusers

    def load_tuned(self, base: TextToImage, folder: Path, seed: int) -> tuple[TextToImage, TextToImage]:
        """Return (base, tuned) of a run with its tuned model in `folder`; with an adapter they share their network.

        Raises InputError if it cannot be loaded, or belongs to another model.
        """
        adapter = self.adapter
        if adapter is not None and adapter.continue_from is not None:  # which may be gone, and is not what was tuned
            adapter = adapter.model_copy(update={"continue_from": str(folder)})
        untuned, tuned = base.trainable(adapter, seed=seed)
        tuned.load_weights(folder)
        return untuned, tuned

    def keep(self, folder: Path) -> None:
        """No-op: a pipeline is large, and is loaded from its source again."""

    def bytes_to_keep(self, folder: Path) -> int:
        """Return 0: `keep` writes nothing."""
        return 0

    def kept_in(self, folder: Path) -> Diffusers:
        """Return these settings: `keep` writes nothing."""
        return self

    def load(self, device: str) -> TextToImage:
        """Load the untuned model. Raises InputError if it cannot be loaded."""
        options: dict[str, Any] = {"dtype": {name: getattr(torch, dtype) for name, dtype in self.dtypes.items()}}
        options |= {key: value for key in ("revision", "variant") if (value := getattr(self, key)) is not None}
        pipeline, load = loaded(self.diffusers, options, self.replaced, self.quantization)
        family_of(pipeline)
        load_loras(pipeline, self.loras)
        return self.model(pipeline, load, device)

    def model(self, pipeline: Any, load: Load, device: str) -> TextToImage:
        """Make the untuned model of its pipeline.

        Args:
            load: loads its text encoders again.

        Raises InputError for settings that it does not take.
        """
        default, own = pipeline.scheduler, pipeline.scheduler.config
        for key in self.scheduler:
            if key not in own:
                raise InputError(f"model.scheduler: {type(pipeline.scheduler).__name__} has no {key!r}{did_you_mean(key, own)}")
        check_numbers(self.scheduler, "model.scheduler")
        with refused("model.scheduler: the scheduler refuses its settings"):
            pipeline.scheduler = type(pipeline.scheduler).from_config(own, **self.scheduler)
        given = (
            "text_encoders",
            "prompt_cache_gb",
            "height",
            "width",
            "num_frames",
            "guidance_scale",
            "negative_prompt",
            "max_sequence_length",
            "vae_tiling",
            "vae_slicing",
        )
        with refused("pipeline: cannot be tuned"):
            model = model_of(pipeline, load, device, **{key: getattr(self, key) for key in given})
            model = replace(model, default_scheduler=default)
        if self.gradient_checkpointing:
            cast(Any, model.denoiser.network).enable_gradient_checkpointing()
        if self.attention_backend is not None:
            set_attention_backend(model.denoiser.network, self.attention_backend)
        return model


def load_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Load LoRAs into a pipeline and activate them. Raises InputError if one cannot be loaded, or belongs to another model."""
    if not loras:
        return
    names = [f"lora_{i}" for i in range(len(loras))]
    for i, (name, lora) in enumerate(zip(names, loras, strict=True)):
        with refused(f"model.loras.{i}.path {lora.path}: cannot be loaded"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # it is wanted
            pipeline.load_lora_weights(lora.path, adapter_name=name, use_safetensors=True)
    with refused("model.loras: do not fit the pipeline"):
        pipeline.set_adapters(names, [lora.strength for lora in loras])
