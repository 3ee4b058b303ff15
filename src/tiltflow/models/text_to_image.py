"""Text-to-image pipelines of diffusers as models: what a recipe tunes with `model: {diffusers: PATH_OR_ID}`.

A pipeline becomes a flow on its latents, conditioned on prompts. The base, its schedule, its text encoders and its decoder are
the pipeline's own; what is particular to a family of pipelines is one file in `tiltflow/models/pipelines`.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tiltflow import processes
from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.flows.adapter import AdapterOff, base_of
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.flows.field import VelocityField
from tiltflow.flows.flow import Flow
from tiltflow.flows.guided import Guided
from tiltflow.flows.interpolant import Linear
from tiltflow.models.continued_adapter import continue_adapter
from tiltflow.models.denoiser import Condition, Denoiser
from tiltflow.models.few_steps import few_steps_in_words, own_sampling
from tiltflow.models.pipeline_adapter import add_adapter, loaded_adapters
from tiltflow.models.pipeline_files import SAMPLING, load_weights, save_weights
from tiltflow.models.pipelines import Family
from tiltflow.models.prompt_encoder import PromptEncoder
from tiltflow.models.quantization import is_quantized
from tiltflow.models.schedules import Schedule, drawn_by, scheduler_named
from tiltflow.models.trainable import Adapter, trainable_copy
from tiltflow.offload import scoring
from tiltflow.pictures import IMAGE, Picture, edited, picture_of
from tiltflow.samplers.grid import OwnGrid
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling, check_sampling
from tiltflow.streams import stream
from tiltflow.user_code import explained, refused, whole_number

MOST_DISTORTION = 0.05
"""How much the sides of a picture that is edited may be stretched, one against the other: as much as the pipelines do it."""


@dataclass(frozen=True)
class TextToImage:
    """A text-to-image pipeline that can be sampled and tuned. Made by `from_diffusers`.

    Args:
        pipeline: the diffusers pipeline; its denoiser is `flow.network.network`.
        family: what is particular to its class.
        flow: the velocity field on the latents, bound to no condition; that of `base` may be the same with its adapter off.
        size: height and width of the pictures in pixels.
        guidance_scale: default scale of classifier-free guidance, 1 or less for none, as in diffusers; or the input of a
            network that was distilled from it.
        schedule: path, prediction type and times, from the pipeline's scheduler.
        encoder: the text encoders.
        default_scheduler: the pipeline's scheduler before its settings were changed, if they were.
        sampling: default sampling: Euler's method on the scheduler's own times, or what a scheduler for few steps does.
        num_frames: number of frames of a video; None if it draws pictures.
    """

    pipeline: Any
    family: Family
    flow: Flow | AdapterOff
    size: tuple[int, int]
    guidance_scale: float
    schedule: Schedule
    encoder: PromptEncoder
    default_scheduler: Any = None
    sampling: Sampling = field(default_factory=lambda: Sampling(solver="euler", num_inference_steps=50))
    num_frames: int | None = None

    @property
    def denoiser(self) -> Denoiser:
        """The network of the flow."""
        network: Denoiser = self.flow.network  # type: ignore[assignment]
        return network

    @property
    def prompted(self) -> bool:
        """True: pictures are conditioned on prompts."""
        return True

    @property
    def class_names(self) -> tuple[str, ...]:
        """Empty: pictures are conditioned on prompts, not on classes."""
        return ()

    def trainable(
        self, adapter: Adapter | None = None, pattern: str | re.Pattern[str] = "", *, seed: int = 0
    ) -> tuple[TextToImage, TextToImage]:
        """Return (base, model to train): the model without and with a new LoRA; or the model and a copy of its denoiser.

        Args:
            pattern: regular expression; parameters of the copy whose names contain a match are trained, the others are frozen.

        Raises InputError for a copy of a denoiser that has a LoRA, which plain diffusers could not load again, or quantized
        weights, and for a pattern together with an adapter, whose parameters are the only ones trained.
        """
        if adapter is not None:
            if re.compile(pattern).pattern:
                message = "with an adapter only the adapter is trained; leave it out, or set adapter null"
                raise InputError(f"training.trainable: {message}")
            tuned = with_adapter(self, seed=seed, **adapter.model_dump())
            return tuned.base(), tuned
        if loaded := loaded_adapters(self.denoiser.network):
            raise InputError(
                f"adapter null tunes the whole {self.family.denoiser}, and it has a LoRA loaded ({', '.join(loaded)}): call"
                " pipeline.fuse_lora() and pipeline.unload_lora_weights() first"
            )
        if is_quantized(self.denoiser.network):
            raise InputError(
                f"adapter null tunes the whole {self.family.denoiser}, whose weights are quantized: use an adapter"
            )
        own = trainable_copy(cast(Flow, self.flow), pattern)
        cast(Any, own.network).float()  # whatever the dtype of the frozen one: small updates vanish in 16 bits
        return self, replace(self, flow=own)

    def base(self) -> TextToImage:
        """Return the frozen model: with its adapter off, or with a copy of its denoiser."""
        assert isinstance(self.flow, Flow)
        return replace(self, flow=base_of(self.flow))

    def in_precision(self, dtype: torch.dtype | None) -> TextToImage:
        """Return the model with its denoiser evaluated in this dtype; None is the dtype of its weights."""
        own = replace(self.flow.flow if isinstance(self.flow, AdapterOff) else self.flow, autocast=dtype)
        return replace(self, flow=AdapterOff(own) if isinstance(self.flow, AdapterOff) else own)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of the latents of one picture or video, as the denoiser sees them."""
        if self.num_frames is not None:
            return self.family.video_shape(self.pipeline, self.num_frames, *self.size)
        return self.family.latent_shape(self.pipeline, *self.size)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of one picture: (3, height, width); or of one video: (frames, 3, height, width)."""
        return (3, *self.size) if self.num_frames is None else (self.num_frames, 3, *self.size)

    @property
    def has_decoder(self) -> bool:
        """True: pictures are decoded from latents."""
        return True

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def distilled(self) -> bool:
        """True if there are no negative prompts: the guidance scale is an input of the network, or there is no guidance."""
        return self.family.is_distilled(self.pipeline)

    @property
    def guidance_keeps_norm(self) -> bool:
        """True if a guided velocity has the norm of the unguided one, along the last axis of a state."""
        return self.family.guidance_keeps_norm

    @property
    def takes_guidance(self) -> bool:
        """False if there is no guidance at all."""
        return not self.distilled or self.family.guidance_is_input(self.pipeline)

    def of_few_steps(self, sampling: Sampling) -> list[str]:
        """What is known of a tilt of a model that was distilled to few steps, if this seems to be one; see `few_steps`."""
        return few_steps_in_words(self.pipeline, self.family, self.guidance_scale, sampling)

    @property
    def exported_scheduler(self) -> Any:
        """The scheduler that exports come with: one that takes our steps, or the pipeline's own if a solver takes its steps."""
        return self.schedule.plain if own_sampling(self.pipeline, self.family) is None else self.schedule.own

    @property
    def encoding(self) -> Mapping[str, Any]:
        """Settings of the text encoders that are not the pipeline's own, by name."""
        return {key: value for key, value in asdict(self.encoder.options).items() if value is not None}

    @property
    def size_options(self) -> dict[str, int]:
        """Arguments by which the pipeline draws samples of this size."""
        frames = {} if self.num_frames is None else {"num_frames": self.num_frames}
        return {"height": self.size[0], "width": self.size[1], **frames}

    @property
    def own_grid(self) -> OwnGrid:
        """The times [K + 1] of the pipeline's scheduler on the linear path, increasing from noise to data, float64."""
        return OwnGrid(self.schedule.times, self.schedule.clock)

    @property
    def grid(self) -> OwnGrid:
        """`own_grid` with its last time moved to 1, clean data: the grid of training."""

        def to_data(num_inference_steps: int) -> Tensor:
            times = self.schedule.times(num_inference_steps)
            return torch.cat([times[:-1], times.new_ones(1)])

        return OwnGrid(to_data, self.schedule.clock)

    def start(self, num_samples: int, generator: torch.Generator, t: Tensor) -> Tensor:
        """Draw starting points [num_samples, *event] on the linear path at the first time t of a grid."""
        shape = (num_samples, *self.event_shape)
        latents = torch.randn(shape, generator=generator, device=generator.device)
        return latents * self.schedule.start_scale(t)

    def noise(self, items: Sequence[Item], generator: torch.Generator, t: Tensor) -> Tensor:
        """Draw starting points [len(items), *event]; their law is the same for every prompt."""
        return self.start(len(items), generator, t)

    def encode(
        self, prompts: Sequence[str], guidance_scale: float | None = None, pictures: Sequence[Picture] = ()
    ) -> tuple[Condition, Condition | None]:
        """Encode prompts: (conditions, negative conditions or None), each tensor [batch, ..], on the model's device.

        A prompt that is longer than the text encoders take is truncated, with a warning.

        Args:
            guidance_scale: for a network that takes it as an input; the model's own by default.
            pictures: of `pictures_of`.
        """
        condition, negative = self.encoder(prompts, self.device, pictures)
        if self.family.guidance_is_input(self.pipeline):
            scale = self.guidance_scale if guidance_scale is None else guidance_scale
            condition = {**condition, "guidance": torch.full((len(prompts),), float(scale), device=self.device)}
        return condition, negative

    def conditions(self, items: Sequence[Item]) -> tuple[Condition, Condition | None]:
        """Encode the texts of prompts, and the pictures that they edit; see `encode`."""
        return self.encode([item.text for item in items], pictures=self.pictures_of(items))

    def pictures_of(self, items: Sequence[Item]) -> list[Picture]:
        """Return the pictures that these items edit; none of a pipeline that draws from prompts alone.

        Raises InputError for an item that has none and needs one, or has one that the pipeline does not take, and for a picture
        of another shape than those that are drawn.
        """
        found, name, (height, width) = [], type(self.pipeline).__name__, self.size
        for item in items:
            picture = edited(item.metadata)
            if picture is None and not self.family.edits:
                continue
            which = f"prompt {item.text[:40]!r}"
            if picture is None:
                raise InputError(f"{which}: {name} edits pictures, and it has none: prompts.image_column says where they are")
            if not self.family.edits:
                raise InputError(f"{which}: {name} takes no picture, and it has {picture}; leave it out")
            ratio = picture.size[1] / picture.size[0] * height / width
            if max(ratio, 1 / ratio) > 1 + MOST_DISTORTION:
                raise InputError(
                    f"{which}: its picture {picture} is {picture.size[1]} x {picture.size[0]}, and those that are drawn are"
                    f" {width} x {height}: crop it, or set the model's height and width"
                )
            found.append(picture)
        return found

    @property
    def example(self) -> Item:
        """An item that it can be asked for, where none is at hand."""
        gradient = Picture("a gradient", lambda: Image.linear_gradient("L").convert("RGB").resize(self.size[::-1]))
        return Item("a photograph", {IMAGE: gradient} if self.family.edits else {})

    def encode_ahead(self, items: Sequence[Item]) -> None:
        """Encode all prompts that will come, and then free the text encoders, unless they are to stay; see `TextEncoders`.

        Raises what `pictures_of` raises.
        """
        self.pictures_of(items)
        self.encoder.encode_ahead([item.text for item in items], self.device)

    def save(self, folder: str | Path, card: str = "") -> None:
        """Write what was tuned, as plain diffusers reads it, and `save_sampling`. The card is not written: `tiltflow export`
        writes one.

        A LoRA trained above others is written alone, with a warning that names those.
        """
        self.save_sampling(Path(folder))
        save_weights(self.pipeline, self.denoiser, self.family.denoiser, Path(folder))

    def save_sampling(self, folder: Path) -> None:
        """Write what plain diffusers needs to draw the same pictures: a scheduler, and arguments of the pipeline in
        sampling.json."""
        self.exported_scheduler.save_pretrained(folder / "scheduler")
        own = self.family.arguments(self.size, self.sampling.num_inference_steps)
        options = {**self.size_options, **self.encoding, **own}
        if self.takes_guidance:
            options |= self.family.guided_by(self.guidance_scale)
        if self.family.edits:
            options[IMAGE] = "picture.png"  # a name for the file that the code of an export's card opens
        options["pipeline"] = type(self.pipeline).__name__  # whose arguments they are; exports leave it out
        (folder / SAMPLING).write_text(json.dumps(options) + "\n", encoding="utf-8")

    def load_weights(self, folder: Path) -> None:
        """Load what `save` wrote, in place, into a model that was made in the same way.

        Raises InputError if the weights cannot be read, or belong to another model or adapter.
        """
        load_weights(self.denoiser, self.family.denoiser, folder)

    @scoring()
    def decode(self, latents: Tensor, *, batch_size: int = 4) -> Tensor:
        """Decode latents [batch, *event] into images [batch, 3, height, width], about [-1, 1], or videos [batch, frames, 3,
        height, width]. Differentiable: the activations of each part of `batch_size` are recomputed in the backward pass, so
        that one part at a time is in memory."""

        def images(part: Tensor) -> Tensor:
            decoded = self.family.decode(self.pipeline, part, self.size)
            if decoded.shape[1:] != self.sample_shape:
                got, wanted = list(decoded.shape[1:]), list(self.sample_shape)
                raise InputError(
                    f"the pipeline's decoder returns samples of shape {got}, not {wanted}; is its config.json right?"
                )
            return decoded.to(part.dtype)

        parts = latents.split(batch_size)
        with explained("the pipeline's decoder"):
            # a decoder that recomputes its blocks needs no more than they do, if there is one part
            if torch.is_grad_enabled() and latents.requires_grad and (len(parts) > 1 or not recomputes(self.pipeline.vae)):
                return torch.cat([checkpoint(images, part, use_reentrant=False) for part in parts])
            return torch.cat([images(part) for part in parts])

    def guided(
        self, prompts: Sequence[str], guidance_scale: float | None = None, pictures: Sequence[Picture] = ()
    ) -> Callable[[VelocityField], VelocityField]:
        """Return a function that binds the prompts, one for each sample, to a flow and applies guidance, by default at the
        model's own scale.

        Raises InputError for a scale that is negative or not finite.
        """
        scale = self.guidance_scale if guidance_scale is None else checked_scale(guidance_scale)
        condition, negative = self.encode(prompts, scale, pictures)
        if negative is None or scale <= 1:
            return lambda flow: flow.bind(condition)
        return lambda flow: Guided(flow.bind(condition), flow.bind(negative), scale, self.guidance_keeps_norm)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        guidance_scale: float | None = None,
        latents: Tensor | None = None,
        batch_size: int = 4,
        images: Sequence[Any] | None = None,
    ) -> Tensor:
        """Sample images [len(prompts), 3, height, width], about [-1, 1], or videos [len(prompts), frames, 3, height, width], on
        the CPU: what the pipeline itself would draw if its scheduler were the solver of `sampling`.

        Args:
            latents: the pipeline's starting latents [len(prompts), *event]; drawn from the seed by default.
            guidance_scale: 1 or less for none, as in diffusers; the model's own by default.
            images: the pictures that the prompts edit, one for each: paths, images of PIL, or tensors [3, height, width] in
                [-1, 1].

        Raises InputError for a guidance scale that is negative or not finite.
        """
        drawn = self.sample_latents(
            prompts,
            seed=seed,
            sampling=sampling,
            guidance_scale=guidance_scale,
            latents=latents,
            batch_size=batch_size,
            images=images,
        )
        return self._pictures(drawn, batch_size)

    def _pictures(self, latents: Tensor, batch_size: int) -> Tensor:
        """Decode latents, on the CPU."""
        with eval_mode(self.pipeline.vae):
            return torch.cat([self._decoded(x, batch_size).cpu() for x in latents.split(batch_size)])

    @torch.no_grad()
    def draw_both(
        self,
        items: Sequence[Item],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 4,
    ) -> tuple[Tensor, Tensor]:
        """What `draw` samples, and the latents [len(items), *event] that it is decoded from, on the CPU."""
        latents = self.sample_latents(
            [item.text for item in items],
            seed=seed,
            sampling=sampling,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
            images=self.pictures_of(items) or None,
        )
        return self._pictures(latents, batch_size), latents.cpu()

    def draw(
        self,
        items: Sequence[Item],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 4,
    ) -> Tensor:
        """Sample one picture [3, height, width] of each prompt; see `sample`."""
        texts, images = [item.text for item in items], self.pictures_of(items) or None
        return self.sample(
            texts, seed=seed, sampling=sampling, guidance_scale=guidance_scale, batch_size=batch_size, images=images
        )

    def _decoded(self, latents: Tensor, batch_size: int) -> Tensor:
        """Decode latents, shared among all processes."""
        parts = processes.shares(len(latents))
        return processes.gathered([self.decode(latents[part], batch_size=batch_size) for part in parts], len(latents))

    @torch.no_grad()
    def sample_latents(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        guidance_scale: float | None = None,
        latents: Tensor | None = None,
        batch_size: int = 4,
        images: Sequence[Any] | None = None,
    ) -> Tensor:
        """Sample latents [len(prompts), *event] in the pipeline's own coordinates; see `sample`."""
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f'prompts must be a list of texts, as in ["a red cat"], is {prompts!r}')
        if images is not None and (isinstance(images, (str, Tensor)) or len(images) != len(prompts)):
            raise InputError(f"images must be a list of {len(prompts)} pictures, one for each prompt")
        asked = [
            Item(prompt, {} if images is None else {IMAGE: picture_of(images[i], "images")}) for i, prompt in enumerate(prompts)
        ]
        pictures = self.pictures_of(asked)
        seed, batch_size = whole_number(seed, "seed"), whole_number(batch_size, "batch_size", 1)
        check_sampling(sampling)
        sampling = sampling or self.sampling
        if sampling.scheduler is not None:
            return self._drawn_by_scheduler(prompts, pictures, sampling, seed, guidance_scale, latents, batch_size)
        times = sampling.times(self.own_grid)
        if sampling.solver == "euler":
            self.schedule.warn_of_difference(sampling.num_inference_steps)
        parts = []
        for i, begin in enumerate(range(0, len(prompts), batch_size)):
            part = slice(begin, begin + batch_size)
            some = prompts[part]
            generator = stream(seed, "sample", i, device=self.device)
            if latents is None:
                x = self.start(len(some), generator, times[0])
            else:
                x = latents[part].to(self.device) * self.schedule.start_scale(times[0])
            flow = in_chunks(self.guided(some, guidance_scale, pictures[part])(self.flow))
            with eval_mode(self.denoiser):
                parts.append(sample(flow, x, sampling, generator, start=self.own_grid) * self.schedule.end_scale(times[-1]))
        return torch.cat(parts)

    def scheduler(self, sampling: Sampling) -> tuple[Any, dict[str, Any]]:
        """Return the scheduler of diffusers that `sampling` names, with its timesteps set, and arguments of its steps.

        Raises InputError if there is none, or if it does not fit the model or takes no such steps.
        """
        default = self.schedule.own if self.default_scheduler is None else self.default_scheduler
        found = copy.deepcopy(scheduler_named(str(sampling.scheduler), default))
        self.schedule.set_timesteps(found, sampling.num_inference_steps)
        if "eta" in inspect.signature(found.step).parameters:
            return found, {"eta": sampling.eta}
        if sampling.eta:
            raise InputError(f"scheduler {type(found).__name__}: takes no eta ({sampling.eta:g}); leave it out")
        return found, {}

    def _drawn_by_scheduler(
        self,
        prompts: Sequence[str],
        pictures: Sequence[Picture],
        sampling: Sampling,
        seed: int,
        guidance_scale: float | None,
        latents: Tensor | None,
        batch_size: int,
    ) -> Tensor:
        """Sample latents in the own steps of a scheduler, as the pipeline does; see `sample_latents`."""
        predictions, parts = self._predictions(), []
        for i, begin in enumerate(range(0, len(prompts), batch_size)):
            part = slice(begin, begin + batch_size)
            some = prompts[part]
            generator = stream(seed, "sample", i, device=self.device)
            if latents is None:
                x = torch.randn((len(some), *self.event_shape), generator=generator, device=self.device)
            else:
                x = latents[part].to(self.device)
            own, options = self.scheduler(sampling)
            if "generator" in inspect.signature(own.step).parameters:
                options["generator"] = generator
            field = in_chunks(self.guided(some, guidance_scale, pictures[part])(predictions))
            with eval_mode(self.denoiser), refused(f"scheduler {type(own).__name__}: cannot draw"):
                parts.append(drawn_by(own, field, x, **options))
        return torch.cat(parts)

    def _predictions(self) -> Flow | AdapterOff:
        """The field of the network's predictions: (latents in the network's coordinates, time in its unit) -> prediction."""
        flow = self.flow.flow if isinstance(self.flow, AdapterOff) else self.flow
        network = copy.copy(self.denoiser)
        network.predict = self.family.predictor(self.pipeline, self.size)
        flow = replace(flow, network=network, prediction="velocity", interpolant=Linear())
        return AdapterOff(flow) if isinstance(self.flow, AdapterOff) else flow


def recomputes(vae: Any) -> bool:
    """Whether a decoder recomputes its own activations."""
    return bool(getattr(vae, "is_gradient_checkpointing", False))


def checked_scale(guidance_scale: float) -> float:
    """Return `guidance_scale`. Raises InputError if it is negative or not finite."""
    if not 0 <= guidance_scale < math.inf:
        raise InputError(f"guidance_scale {guidance_scale:g}: must be a number from 0 on; 1 or less is no guidance")
    return guidance_scale


def with_adapter(
    model: TextToImage,
    *,
    rank: int = 16,
    lora_alpha: int | None = None,
    target_modules: Sequence[str] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    continue_from: str | None = None,
    seed: int = 0,
) -> TextToImage:
    """Return `model` with a new LoRA in its own denoiser, in float32: only the new one requires gradients, and without it the
    network is unchanged. A LoRA that is loaded and active stays active below the new one, at its strength.

    Args:
        lora_alpha: as in peft, the adapter's output is scaled by lora_alpha / rank; `rank` by default.
        target_modules: ends of the names of the layers; the attention of the family by default.
        use_rslora, use_dora: as in peft.
        continue_from: a LoRA in the place of a new one, with its own rank, scale and layers.

    Raises InputError if peft is not installed, if no layer has such a name, if a LoRA is fused into the weights and still
    loaded, or if the one to continue cannot be loaded.
    """
    names = None if target_modules is None else tuple(target_modules)
    adapter = Adapter(
        rank=rank, lora_alpha=lora_alpha, target_modules=names, use_rslora=use_rslora, use_dora=use_dora,
        continue_from=continue_from,
    )  # fmt: skip
    assert isinstance(model.flow, Flow)
    if continue_from is not None:
        network = continue_adapter(model.pipeline, model.denoiser, model.family.denoiser, continue_from)
    else:
        network = add_adapter(model.denoiser, adapter, model.family.target_modules, seed)
    return replace(model, flow=replace(model.flow, network=network))
