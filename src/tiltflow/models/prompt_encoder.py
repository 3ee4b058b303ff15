"""The encoders of a pipeline: prompts, and pictures that are edited, become conditions of its denoiser, each encoded once."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from tiltflow import processes
from tiltflow.errors import Note
from tiltflow.flows.conditions import joined
from tiltflow.formatting import duration
from tiltflow.models.denoiser import Condition, floating_dtype
from tiltflow.models.pipelines import Family, TextOptions
from tiltflow.models.text_encoders import TextEncoders
from tiltflow.pictures import Picture
from tiltflow.user_code import explained

CLIP_TOKENS = 77
"""Number of tokens that CLIP takes."""
SECONDS_BETWEEN = 15.0
"""Between two lines that say how many prompts are encoded."""
CACHE_GB = 4.0
"""Gigabytes of conditions that are cached: about 36,000 prompts of Stable Diffusion 1.5 and 1,500 of 3, in 16 bits."""


class Encoded(NamedTuple):
    """Conditions in the dtype of the denoiser, and the bytes of the first: all prompts share the negative one."""

    condition: Any
    negative: Any
    size: int


@dataclass(frozen=True)
class PromptEncoder:
    """The encoders of a pipeline, with a cache on the CPU. Each prompt is in it alone, as long as it is; in a batch the shorter
    ones get zeros, which the mask of the family tells from the rest. Each picture is in it alone too, for all its prompts.

    Args:
        size: height and width of the pictures in pixels, which some families encode too.
        options: settings of the text encoders.
        encoders: the text encoders in memory, or not.
        most_bytes: of the conditions in the cache; pictures go first, as their encoder is never freed, and of them and of
            prompts those that were used least recently.
    """

    pipeline: Any
    family: Family
    size: tuple[int, int]
    options: TextOptions
    encoders: TextEncoders
    most_bytes: float = CACHE_GB * 2**30
    cache: dict[str | Picture, Encoded] = field(default_factory=dict, repr=False)
    """Of the most recent prompts and pictures, the latest last. The conditions of a picture are what it adds to the others."""

    def __call__(
        self, prompts: Sequence[str], device: torch.device, pictures: Sequence[Picture] = ()
    ) -> tuple[Condition, Condition | None]:
        """Encode prompts: (conditions, negative conditions or None), each tensor [batch, ..], on `device`.

        Each prompt is encoded by itself, so that it matters neither with which others nor whether it was in the cache. A prompt
        longer than the text encoders take is truncated as the pipeline truncates it, with a warning.

        Args:
            pictures: one for each prompt, of a family that edits; none of any other.
        """
        keys: list[str | Picture] = list(dict.fromkeys([*prompts, *pictures]))
        for key in keys:
            if key in self.cache:
                self.cache[key] = self.cache.pop(key)  # the latest is last
                continue
            encoded = self._picture(key) if isinstance(key, Picture) else self._prompt(key)
            condition, negative = kept(
                encoded, floating_dtype(getattr(self.pipeline, self.family.denoiser)), pinned=device.type == "cuda"
            )
            if isinstance(key, str):  # the negative condition does not depend on the prompt: all share the first one
                negative = next((one.negative for other, one in self.cache.items() if isinstance(other, str)), negative)
            size = sum(part.nbytes for part in tree_leaves(condition) if isinstance(part, Tensor))
            self.cache[key] = Encoded(condition, negative, size)
        # moved one by one: joined on the CPU they would not be pinned
        there = {key: on_device(self.cache[key], device) for key in keys}
        condition, negative = (joined([there[prompt][i] for prompt in prompts]) for i in (0, 1))
        if pictures:
            seen = joined([there[picture][0] for picture in pictures])
            condition, negative = {**condition, **seen}, None if negative is None else {**negative, **seen}
        while self.cache and sum(one.size for one in self.cache.values()) > self.most_bytes:
            oldest = next((key for key in self.cache if isinstance(key, Picture)), next(iter(self.cache)))
            del self.cache[oldest]
        return condition, negative

    def _prompt(self, prompt: str) -> tuple[Any, Any]:
        with torch.no_grad(), explained("the pipeline's text encoder"):
            pipeline = self.encoders.ready()
            self._warn_of_length(prompt)
            return self.family.encode(pipeline, [prompt], self.size, self.options)

    def _picture(self, picture: Picture) -> tuple[Any, Any]:
        pixels = picture.pixels(*self.size)[None].to(self.pipeline.vae.device)
        with torch.no_grad(), explained("the pipeline's encoder of pictures"):
            return self.family.encode_pictures(self.pipeline, pixels, self.size), None

    def encode_ahead(self, prompts: Sequence[str], device: torch.device) -> None:
        """Encode all prompts of a training, and free the text encoders if that is what becomes of them. If the cache cannot
        hold them all, nothing is freed, and a note says so."""
        if self.encoders.use != "free":
            return
        several, began, told = list(dict.fromkeys(prompts)), time.perf_counter(), 0.0
        with self.encoders.alone(getattr(self.pipeline, self.family.denoiser)):
            for count, prompt in enumerate(several, 1):
                self([prompt], device)
                if prompt not in self.cache or len(several) * self.cache[prompt].size > self.most_bytes:
                    break
                seconds = time.perf_counter() - began
                if seconds >= told + SECONDS_BETWEEN and count < len(several) and processes.is_main():
                    told = seconds
                    left = duration(seconds / count * (len(several) - count))
                    warnings.warn(f"{count} of {len(several)} prompts are encoded, {left} left", Note, stacklevel=3)
            if all(prompt in self.cache for prompt in several):
                self.encoders.free()
                return
        text = (
            f"the conditions of {len(several)} prompts are more than model.prompt_cache_gb, {self.most_bytes / 2**30:.3g}, can"
        )
        text += " hold: the text encoders are not freed; text_encoders cpu keeps them off the device"
        warnings.warn(text, Note, stacklevel=3)

    def _warn_of_length(self, prompt: str) -> None:
        """Warn if a tokenizer truncates a prompt: CLIP takes 77 tokens, T5 as many as the pipeline says."""
        cut: list[tuple[str, int, int]] = []
        whole: list[str] = []
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(self.pipeline, name, None)
            if tokenizer is None or getattr(self.pipeline, name.replace("tokenizer", "text_encoder"), None) is None:
                continue
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # some pipelines have a processor of texts and pictures
            most = tokenizer.model_max_length
            if most > CLIP_TOKENS and self.family.max_sequence_length is not None:
                most = self.options.max_sequence_length or self.family.max_sequence_length
            text = self.family.written(self.pipeline, prompt)
            count = len(tokenizer(text, truncation=False, verbose=False).input_ids)
            if count > most:
                cut.append((name, most, count))
            else:
                whole.append(name)
        for name, most, count in cut[:1]:
            rest = f"the rest is seen by {' and '.join(whole)} alone" if whole else "the rest is not seen"
            text = f"prompt {prompt[:40]!r}: {name} takes {most} of its {count} tokens, {rest}"
            warnings.warn(text, Note, stacklevel=6)


def kept(conditions: Any, dtype: torch.dtype, *, pinned: bool) -> Any:
    """Nested conditions on the CPU, those that are no integers in `dtype`; pinned, they can be copied while a GPU computes."""

    def one(part: Tensor) -> Tensor:
        part = part.to("cpu", dtype if part.is_floating_point() else part.dtype)
        return part.pin_memory() if pinned else part

    return tree_map_only(Tensor, one, conditions)


def on_device(conditions: Any, device: torch.device) -> Any:
    """Move all tensors of nested conditions to a device."""
    return tree_map_only(Tensor, lambda part: part.to(device, non_blocking=True), conditions)
