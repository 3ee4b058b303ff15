"""Text-to-image pipelines of diffusers: what a recipe tunes with `model: {diffusers: PATH_OR_ID}`.

A pipeline becomes a flow on its latents, conditioned on prompts. The base, its schedule, its text encoders and its decoder are
the pipeline's own; what is particular to a family of pipelines is one file in `tiltflow/models/pipelines`.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from tiltflow import processes
from tiltflow.conditions.prompts import Prompt
from tiltflow.errors import InputError, Note, did_you_mean, not_installed
from tiltflow.flows.adapter import AdapterOff, base_of
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.flows.field import VelocityField
from tiltflow.flows.flow import AnyFloats, Flow
from tiltflow.flows.guided import Guided
from tiltflow.flows.precision import GRADIENT_SCALE, scale_gradient
from tiltflow.models.pipeline_folder import check_pipeline_folder, check_weights
from tiltflow.models.schedules import Schedule, schedule_of
from tiltflow.models.trainable import Adapter, trainable_copy
from tiltflow.plugins import module_of, names
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling, check_sampling
from tiltflow.shipped import INDEX, assets, by_name
from tiltflow.streams import stream
from tiltflow.user_code import check_device, explained, refused, whole_number

CLIP_TOKENS = 77
"""As many tokens of a prompt as CLIP takes."""
CONDITIONS_KEPT = 256
"""Prompts whose conditions are kept: 1.4 GB of Stable Diffusion 3."""
GuidanceMode = Literal["none", "rollout", "full"]
Condition = Mapping[str, Any]


class Denoiser(AnyFloats):
    """The network of a pipeline, called as (x [batch, *event], time [batch], condition) -> prediction, in the dtype of x.

    Gradients are larger inside a network in float16 (`tiltflow.flows.precision`), and as they should be outside and in its
    adapter.
    """

    def __init__(self, network: nn.Module, predict: Callable[..., Tensor]):
        super().__init__()
        self.network, self.predict = network, predict

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        dtype = floating_dtype(self.network)
        with explained("the pipeline's denoiser"):
            if dtype != torch.float16:
                return self.predict(self.network, x.to(dtype), time.float(), in_dtype(condition, dtype)).to(x.dtype)
            inside = scale_gradient(x, 1 / GRADIENT_SCALE).to(dtype)
            predicted = self.predict(self.network, inside, time.float(), in_dtype(condition, dtype)).to(x.dtype)
            return scale_gradient(predicted, GRADIENT_SCALE)


def floating_dtype(network: nn.Module) -> torch.dtype:
    """In which a network computes: that of the first weights that are floats of 16 bits or more, which those that are packed
    into 8 or 4 bits, by bitsandbytes or others, are not."""
    dtypes = (p.dtype for p in network.parameters() if p.is_floating_point() and p.element_size() > 1)
    return next(dtypes, torch.float32)


class AdaptedDenoiser(Denoiser):
    """The network of a pipeline with a new adapter, which can be switched off.

    Args:
        adapter: its name in the network. It alone requires gradients.
        below: the names of the adapters that were active before, and stay so when the new one is off.
    """

    def __init__(self, network: nn.Module, predict: Callable[..., Tensor], adapter: str, below: Sequence[str] = ()):
        super().__init__(network, predict)
        self.adapter, self.below = adapter, tuple(below)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        network: Any = self.network
        if self.below:
            self.activate(self.below)
        else:
            network.disable_adapters()
        try:
            yield
        finally:
            if self.below:
                self.activate((*self.below, self.adapter))
            else:
                network.enable_adapters()

    def activate(self, names: Sequence[str]) -> None:
        """These adapters are on, and no other. peft makes all that are on trainable: those below are frozen again."""
        network: Any = self.network
        network.set_adapter(list(names))
        if self.below:
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and self.adapter in name.split("."))


@dataclass(frozen=True)
class TextToImage:
    """A text-to-image pipeline that can be sampled and tuned. Made by `from_diffusers`.

    Args:
        pipeline: the diffusers pipeline; its denoiser is `flow.network.network`.
        family: the file in `tiltflow.models.pipelines` that knows it.
        flow: on the latents, bound to no condition; that of `base` may be the same with its adapter off.
        size: height and width of the pictures.
        guidance_scale: of classifier-free guidance, 1 or less for none, as in diffusers; or the input of a network that was
            distilled from it.
        schedule: what the pipeline's scheduler says.
        encoding: what the pipeline encodes prompts with, if not with its own: negative_prompt, max_sequence_length.
        sampling: how to sample where nothing else is asked for: the scheduler's own times, without noise.
    """

    pipeline: Any
    family: ModuleType
    flow: Flow | AdapterOff
    size: tuple[int, int]
    guidance_scale: float
    schedule: Schedule
    encoding: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=lambda: Sampling(solver="euler", num_inference_steps=50))
    encoded: dict[str, tuple[Any, Any]] = field(default_factory=dict, repr=False)
    """The conditions of the prompts seen last, on the CPU: of CONDITIONS_KEPT they are computed once."""

    @property
    def denoiser(self) -> Denoiser:
        """The network of the flow."""
        network: Denoiser = self.flow.network  # type: ignore[assignment]
        return network

    @property
    def prompted(self) -> bool:
        """True: pictures are asked for by prompts."""
        return True

    @property
    def class_names(self) -> tuple[str, ...]:
        """None: pictures are asked for by prompts."""
        return ()

    def trainable(
        self, adapter: Adapter | None = None, pattern: str | re.Pattern[str] = "", *, seed: int = 0
    ) -> tuple[TextToImage, TextToImage]:
        """(base, what is going to be trained): the model with a new LoRA, and without it; or the model and a copy.

        Args:
            pattern: of a copy, the parameters in whose name this regular expression is found; the others stay as they are.

        Raises InputError for a copy of a denoiser with a LoRA in it, which plain diffusers could not load again, and for a
        pattern beside an adapter, which is trained alone.
        """
        if adapter is not None:
            if re.compile(pattern).pattern:
                message = "with an adapter the adapter alone is trained; leave it out, or set adapter null"
                raise InputError(f"training.trainable: {message}")
            tuned = with_adapter(self, seed=seed, **adapter.model_dump())
            return tuned.base(), tuned
        if loaded := getattr(self.denoiser.network, "peft_config", {}):
            raise InputError(
                f"adapter null tunes the whole {self.family.DENOISER}, and it has a LoRA loaded ({', '.join(loaded)}): call"
                " pipeline.fuse_lora() and pipeline.unload_lora_weights() first"
            )
        copy = trainable_copy(cast(Flow, self.flow), pattern)
        cast(Any, copy.network).float()  # whatever the dtype of the frozen one: small updates vanish in 16 bits
        return self, replace(self, flow=copy)

    def base(self) -> TextToImage:
        """The model as it is now, frozen: its adapter off, or with a copy of the denoiser."""
        assert isinstance(self.flow, Flow)
        return replace(self, flow=base_of(self.flow))

    def in_precision(self, dtype: torch.dtype | None) -> TextToImage:
        """The model with its denoiser evaluated in this dtype; None is that of its weights."""
        own = replace(self.flow.flow if isinstance(self.flow, AdapterOff) else self.flow, autocast=dtype)
        return replace(self, flow=AdapterOff(own) if isinstance(self.flow, AdapterOff) else own)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Of the latents of one sample, as the denoiser sees them."""
        shape: tuple[int, ...] = self.family.latent_shape(self.pipeline, *self.size)
        return shape

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Of one picture."""
        return (3, *self.size)

    @property
    def has_decoder(self) -> bool:
        """True: pictures are decoded from latents."""
        return True

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def distilled(self) -> bool:
        """Whether there are no negative prompts: the guidance scale is an input of the network, or there is none."""
        return hasattr(self.family, "distilled_guidance")

    def own_grid(self, num_inference_steps: int) -> Tensor:
        """The times of the pipeline's scheduler [K + 1], linear, from noise to data, float64."""
        return self.schedule.times(num_inference_steps)

    def grid(self, num_inference_steps: int) -> Tensor:
        """`own_grid`, to the end: clean data. What is tuned."""
        times = self.own_grid(num_inference_steps)
        return torch.cat([times[:-1], times.new_ones(1)])

    def start(self, num_samples: int, generator: torch.Generator, t: Tensor) -> Tensor:
        """Starting points [num_samples, *event] on the linear path, at the first time t of a grid: the pipeline's latents."""
        shape = (num_samples, *self.event_shape)
        latents = torch.randn(shape, generator=generator, device=generator.device)
        return latents * self.schedule.start_scale(t)

    def noise(self, items: Sequence[Prompt], generator: torch.Generator, t: Tensor) -> Tensor:
        """`start`, the same for every prompt."""
        return self.start(len(items), generator, t)

    def encode(self, prompts: Sequence[str], guidance_scale: float | None = None) -> tuple[Condition, Condition | None]:
        """The conditions of prompts and the negative ones, where the family has them; each tensor is [batch, ..].

        The text encoders see a prompt once, as long as there are no more than CONDITIONS_KEPT. A prompt that is longer than
        they take warns, and is cut as the pipeline cuts it.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt in self.encoded:
                self.encoded[prompt] = self.encoded.pop(prompt)  # the latest is last
                continue
            with torch.no_grad(), explained("the pipeline's text encoder"):
                self._warn_of_length(prompt)
                pair = on_device(self.family.encode(self.pipeline, [prompt], self.size, **self.encoding), torch.device("cpu"))
            # the negative one does not depend on the prompt: all share that of the first
            self.encoded[prompt] = pair[0], next(iter(self.encoded.values()), pair)[1]
        several = (joined([self.encoded[prompt][i] for prompt in prompts]) for i in (0, 1))
        condition, negative = on_device(tuple(several), self.device)
        for prompt in list(self.encoded)[:-CONDITIONS_KEPT]:
            del self.encoded[prompt]
        if self.distilled and self.family.distilled_guidance(self.pipeline):
            scale = self.guidance_scale if guidance_scale is None else guidance_scale
            condition = {**condition, "guidance": torch.full((len(prompts),), float(scale), device=self.device)}
        return condition, negative

    def conditions(self, items: Sequence[Prompt]) -> tuple[Condition, Condition | None]:
        """`encode`, of the texts of prompts."""
        return self.encode([item.text for item in items])

    def save(self, folder: str | Path, card: str = "") -> None:
        """`save_tuned`; there is no card: `tiltflow export` writes one."""
        save_tuned(self, Path(folder))

    def _warn_of_length(self, prompt: str) -> None:
        """CLIP takes 77 tokens, T5 as many as the pipeline says: what one of them does not see, another may."""
        lengths = inspect.signature(self.family.encode).parameters
        cut: list[tuple[str, int, int]] = []
        whole: list[str] = []
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(self.pipeline, name, None)
            if tokenizer is None or getattr(self.pipeline, name.replace("tokenizer", "text_encoder"), None) is None:
                continue
            most = tokenizer.model_max_length
            if most > CLIP_TOKENS and "max_sequence_length" in lengths:
                most = self.encoding.get("max_sequence_length", lengths["max_sequence_length"].default)
            count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if count > most:
                cut.append((name, most, count))
            else:
                whole.append(name)
        for name, most, count in cut[:1]:
            rest = f"the rest is seen by {' and '.join(whole)} alone" if whole else "the rest is not seen"
            text = f"prompt {prompt[:40]!r}: {name} takes {most} of its {count} tokens, {rest}"
            warnings.warn(text, Note, stacklevel=5)

    def decode(self, latents: Tensor, *, batch_size: int = 4) -> Tensor:
        """Images [batch, 3, height, width], about [-1, 1], of latents [batch, *event]. Differentiable: parts of `batch_size`
        are computed once more on the way back, so that one part at a time is in memory."""

        def images(part: Tensor) -> Tensor:
            unpacked = self.family.unpack(self.pipeline, part, self.size)
            decoded: Tensor = self.pipeline.vae.decode(unpacked.to(self.pipeline.vae.dtype), return_dict=False)[0]
            return decoded.to(part.dtype)

        parts = latents.split(batch_size)
        with explained("the pipeline's decoder"):
            if torch.is_grad_enabled() and latents.requires_grad:
                return torch.cat([checkpoint(images, part, use_reentrant=False) for part in parts])
            return torch.cat([images(part) for part in parts])

    def guided(self, prompts: Sequence[str], guidance_scale: float | None = None) -> Callable[[VelocityField], VelocityField]:
        """Binds these prompts, one for each sample, to a flow and applies guidance, by default at the model's own scale.

        Raises InputError for a scale that is negative or not finite.
        """
        scale = self.guidance_scale if guidance_scale is None else checked_scale(guidance_scale)
        condition, negative = self.encode(prompts, scale)
        if negative is None or scale <= 1:
            return lambda flow: flow.bind(condition)
        return lambda flow: Guided(flow.bind(condition), flow.bind(negative), scale)

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
    ) -> Tensor:
        """Images [len(prompts), 3, height, width], about [-1, 1], on the CPU: what the pipeline itself would draw, if its
        scheduler were the solver of `sampling`.

        Args:
            latents: the pipeline's starting latents [len(prompts), *event]; drawn from the seed otherwise.
            guidance_scale: 1 or less for none, as in diffusers; the model's own by default.

        Raises InputError for a guidance scale that is negative or not finite.
        """
        drawn = self.sample_latents(
            prompts, seed=seed, sampling=sampling, guidance_scale=guidance_scale, latents=latents, batch_size=batch_size
        )
        with eval_mode(self.pipeline.vae):
            return torch.cat([self._decoded(x, batch_size).cpu() for x in drawn.split(batch_size)])

    def draw(
        self,
        items: Sequence[Prompt],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 4,
    ) -> Tensor:
        """`sample`, a picture of each of these prompts."""
        texts = [item.text for item in items]
        return self.sample(texts, seed=seed, sampling=sampling, guidance_scale=guidance_scale, batch_size=batch_size)

    def _decoded(self, latents: Tensor, batch_size: int) -> Tensor:
        """`decode`, by all processes together."""
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
    ) -> Tensor:
        """`sample`, before the decoder: [len(prompts), *event] in the pipeline's own coordinates."""
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise InputError(f'prompts must be a list of texts, as in ["a red cat"], is {prompts!r}')
        seed, batch_size = whole_number(seed, "seed"), whole_number(batch_size, "batch_size", 1)
        check_sampling(sampling)
        sampling = sampling or self.sampling
        times = sampling.times(self.own_grid)
        if sampling.solver == "euler":
            self.schedule.warn_of_difference(sampling.num_inference_steps)
        parts = []
        for i, begin in enumerate(range(0, len(prompts), batch_size)):
            some = prompts[begin : begin + batch_size]
            generator = stream(seed, "sample", i, device=self.device)
            if latents is None:
                x = self.start(len(some), generator, times[0])
            else:
                x = latents[begin : begin + batch_size].to(self.device) * self.schedule.start_scale(times[0])
            flow = in_chunks(self.guided(some, guidance_scale)(self.flow))
            with eval_mode(self.denoiser):
                parts.append(sample(flow, x, sampling, generator, start=self.own_grid) * self.schedule.end_scale(times[-1]))
        return torch.cat(parts)


def checked_scale(guidance_scale: float) -> float:
    """`guidance_scale`. Raises InputError if it is negative or not finite."""
    if not 0 <= guidance_scale < math.inf:
        raise InputError(f"guidance_scale {guidance_scale:g}: must be a number from 0 on; 1 or less is no guidance")
    return guidance_scale


def in_dtype(condition: Any, dtype: torch.dtype) -> Any:
    """Conditions in the dtype of the network that reads them, which may be a copy in another than the text encoders'."""
    if isinstance(condition, Mapping):
        return {key: in_dtype(value, dtype) for key, value in condition.items()}
    return condition.to(dtype)


def on_device(conditions: Any, device: torch.device) -> Any:
    """The same conditions there."""
    return tree_map_only(Tensor, lambda part: part.to(device), conditions)


def joined(conditions: Sequence[Any]) -> Any:
    """Conditions of single prompts [1, ..] as one of a batch; None where there are none."""
    first = conditions[0]
    if isinstance(first, Mapping):
        return {key: joined([condition[key] for condition in conditions]) for key in first}
    return None if first is None else torch.cat(list(conditions))


def families() -> dict[str, ModuleType]:
    """The family of each pipeline class that is known, by the name of the class."""
    found = [module_of("models.pipelines", name) for name in names("models.pipelines")]
    return {module.PIPELINE: module for module in found}


@refused("pipeline: is none that can be tuned")
def from_diffusers(
    pipeline_or_path: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    max_sequence_length: int | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> TextToImage:
    """A text-to-image pipeline of diffusers as a model: a pipeline, a folder with one, or its name, in tiltflow or on the hub.

    Args:
        height, width: of the pictures, in pixels; the pipeline's own by default.
        guidance_scale: 7.5 by default, 3.5 where it is an input of the network; 1 or less is no guidance, as in diffusers.
        negative_prompt: what guidance leads away from; nothing, or the empty prompt, by default, as in diffusers.
        max_sequence_length: tokens of a prompt that T5 sees, where there is one; the pipeline's own number by default.
        options: of `DiffusionPipeline.from_pretrained`, such as `dtype` (float32 by default), `revision` and `variant`.

    The decoder is read and kept in float32. Weights are read from safetensors only, and no code of the repository is run.

    Raises InputError if there is no such pipeline, if its class is not known, if a component is missing, or for a size, a
    guidance scale or a setting of the text encoders that cannot be.
    """
    check_device(device)
    pipeline = load_pipeline(pipeline_or_path, options) if isinstance(pipeline_or_path, (str, Path)) else pipeline_or_path
    known, name = families(), type(pipeline).__name__
    if name not in known:
        raise InputError(
            f"pipeline {name} is not known{did_you_mean(name, known)}; docs/text-to-image.md shows how to add a family"
        )
    family = known[name]
    if missing := [part for part in family.NEEDED if getattr(pipeline, part, None) is None]:
        raise InputError(f"pipeline {name}: has no {missing[0]}")
    own = family.default_size(pipeline)
    size = (own[0] if height is None else height, own[1] if width is None else width)
    factor = pipeline.vae_scale_factor * (2 if hasattr(family, "image_tokens") else 1)
    if any(side < 1 or side % factor for side in size):
        raise InputError(f"height and width must be multiples of {factor}, got {size[0]} and {size[1]}")
    pipeline.to(device)
    if pipeline.vae.dtype != torch.float32:
        pipeline.vae.to(torch.float32)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)
    network = getattr(pipeline, family.DENOISER)
    if network.config.get("time_cond_proj_dim") is not None:
        raise InputError(
            f"pipeline {name}: its {family.DENOISER} was distilled to take the guidance scale as an input (time_cond_proj_dim),"
            " which is known here for FLUX alone"
        )
    asked = {"negative_prompt": negative_prompt, "max_sequence_length": max_sequence_length}
    encoding = {key: value for key, value in asked.items() if value is not None}
    for key in encoding:
        if key not in inspect.signature(family.encode).parameters:
            raise InputError(f"{key}: pipeline {name} takes none; leave it out")
    denoiser = Denoiser(network, family.predictor(pipeline, size))
    scale = (
        checked_scale(guidance_scale) if guidance_scale is not None else 3.5 if hasattr(family, "distilled_guidance") else 7.5
    )
    tokens = family.image_tokens(pipeline, *size) if hasattr(family, "image_tokens") else 0
    schedule = schedule_of(pipeline.scheduler, tokens, getattr(family, "sigmas", None))
    flow = Flow(denoiser, schedule.prediction, schedule.path)
    model = TextToImage(pipeline, family, flow, size, scale, schedule, encoding)
    schedule.warn_of_difference(min(model.sampling.num_inference_steps, schedule.own.config.num_train_timesteps // 2))
    if guidance_scale is not None and model.distilled and not family.distilled_guidance(pipeline):
        raise InputError("guidance_scale: this model was distilled without guidance and takes none; leave it out")
    return model


def load_pipeline(path: str | Path, options: dict[str, Any]) -> Any:
    """A pipeline that ships with tiltflow, from a folder or from the hub. Raises InputError if it cannot be had."""
    try:
        from diffusers import DiffusionPipeline
    except ImportError:
        raise not_installed("diffusers", "diffusers") from None
    path = by_name(path, assets(INDEX), "pipeline") or path
    if os.path.isabs(path) and not Path(path).exists():
        raise InputError(f"model.diffusers {path}: there is no such folder")
    if Path(path).is_dir():
        check_pipeline_folder(Path(path))
    options = {"use_safetensors": True, **options}
    # float32 as in recipes: without a dtype, text encoders would come in that of their file; torch_dtype is the older name
    dtype = options.pop("torch_dtype", options.get("dtype", torch.float32))
    # a decoder that is rounded to 16 bits first stays so
    options["dtype"] = {"vae": torch.float32, **(dtype if isinstance(dtype, Mapping) else {"default": dtype})}
    with refused(f"model.diffusers {path}: cannot be loaded"):
        pipeline = DiffusionPipeline.from_pretrained(str(path), **options)
        if Path(path).is_dir():
            check_weights(Path(path), pipeline.components)
    return pipeline


def with_adapter(
    model: TextToImage,
    *,
    rank: int = 16,
    lora_alpha: int | None = None,
    target_modules: Sequence[str] | None = None,
    seed: int = 0,
) -> TextToImage:
    """`model` with a new LoRA in its own denoiser, in float32: only the new one requires gradients, and without it the network
    is what it was. A LoRA that is loaded and active already stays so below the new one, at its strength.

    Args:
        lora_alpha: as in peft, the adapter's output is scaled by lora_alpha / rank; by default `rank`.
        target_modules: the ends of the names of the layers; the attention of the family by default.

    Raises InputError if peft is not installed, no layer has such a name, or a LoRA is fused into the weights and still loaded.
    """
    adapter = Adapter(
        rank=rank, lora_alpha=lora_alpha, target_modules=None if target_modules is None else tuple(target_modules)
    )
    config = adapter.config(model.family.TARGET_MODULES)
    network: Any = model.denoiser.network
    below, taken = active_adapters(network), getattr(network, "peft_config", {})
    name = next(name for i in itertools.count() if (name := f"tiltflow_{i}" if i else "default") not in taken)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # it is wanted
            torch.manual_seed(stream(seed, "adapter").initial_seed())
            network.add_adapter(config, name)
    except ValueError as error:
        raise InputError(f"adapter.target_modules: {str(error).splitlines()[0]}") from None
    denoiser, computed = AdaptedDenoiser(network, model.denoiser.predict, name, below), floating_dtype(network)
    network.enable_adapters()
    denoiser.activate((*below, name))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if computed == torch.float16:
                parameter.register_hook(lambda gradient: gradient / GRADIENT_SCALE)
    assert isinstance(model.flow, Flow)
    return replace(model, flow=replace(model.flow, network=denoiser))


def active_adapters(network: nn.Module) -> list[str]:
    """The names of the adapters that a network is evaluated with. Raises InputError if one is fused into the weights and still
    loaded: peft would take it out of them again when another one is added."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise InputError(
            "a LoRA is fused into the pipeline and still loaded: call pipeline.unload_lora_weights() first; it stays fused"
        )
    return list(dict.fromkeys(name for layer in layers if not layer.disable_adapters for name in layer.active_adapters))


LORA, SAMPLING = "pytorch_lora_weights.safetensors", "sampling.json"


def save_tuned(model: TextToImage, folder: Path) -> None:
    """Write what was tuned: an adapter as `pipeline.load_lora_weights(folder)` reads it, or the denoiser as its class does; and
    `save_sampling`. Of an adapter above others it is the new one alone, and a warning says what it needs below it."""
    save_sampling(model, folder)
    network: Any = model.denoiser.network
    if not isinstance(model.denoiser, AdaptedDenoiser):
        network.save_pretrained(folder / model.family.DENOISER)
        return
    from peft import get_peft_model_state_dict

    adapter, below = model.denoiser.adapter, model.denoiser.below
    layers = get_peft_model_state_dict(network, adapter_name=adapter)
    metadata = {f"{model.family.DENOISER}_lora_adapter_metadata": network.peft_config[adapter].to_dict()}
    model.pipeline.save_lora_weights(folder, **{f"{model.family.DENOISER}_lora_layers": layers}, **metadata)
    if below:
        warnings.warn(
            f"{folder}: holds the new adapter alone, which was trained on top of {', '.join(map(repr, below))}: load that too",
            Note,
            stacklevel=2,
        )


def save_sampling(model: TextToImage, folder: Path) -> None:
    """Write what plain diffusers draws the same pictures with: a scheduler, and arguments of the pipeline in sampling.json."""
    model.schedule.plain.save_pretrained(folder / "scheduler")
    options = {**dict(zip(("height", "width"), model.size, strict=True)), **model.encoding}
    if not model.distilled or model.family.distilled_guidance(model.pipeline):
        options["guidance_scale"] = model.guidance_scale
    (folder / SAMPLING).write_text(json.dumps(options) + "\n", encoding="utf-8")


def load_tuned(model: TextToImage, folder: Path) -> None:
    """Put what `save_tuned` wrote into a model made in the same way. Raises InputError if it is not there, or is another."""
    network: Any = model.denoiser.network
    adapter = model.denoiser.adapter if isinstance(model.denoiser, AdaptedDenoiser) else None
    path = folder / (f"{model.family.DENOISER}/diffusion_pytorch_model.safetensors" if adapter is None else LORA)
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the weights cannot be read ({error})") from None
    if adapter is None:
        with refused(f"{path}: is not the denoiser of this model"):
            network.load_state_dict(weights)
        return
    from peft import set_peft_model_state_dict

    prefix = f"{model.family.DENOISER}."
    wrong = f"{path}: is not an adapter of this model; are rank and target_modules those of the recipe?"
    with refused(wrong):
        own = {key.removeprefix(prefix): value for key, value in weights.items()}
        result: Any = set_peft_model_state_dict(network, own, adapter_name=adapter)
    if result.unexpected_keys or any(adapter in key.split(".") for key in result.missing_keys):
        raise InputError(wrong)
