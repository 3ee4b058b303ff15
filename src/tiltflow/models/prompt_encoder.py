"""The text encoders of a pipeline: prompts become conditions of its denoiser, each prompt encoded once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tiltflow.errors import Note
from tiltflow.flows.conditions import joined
from tiltflow.models.denoiser import Condition
from tiltflow.models.pipelines import Family, TextOptions
from tiltflow.user_code import explained

CLIP_TOKENS = 77
"""Number of tokens that CLIP takes."""
CONDITIONS_KEPT = 256
"""Number of prompts whose conditions are cached: 1.4 GB for Stable Diffusion 3."""


@dataclass(frozen=True)
class PromptEncoder:
    """The text encoders of a pipeline, with a cache on the CPU. Each prompt is in it alone, as long as it is; in a batch the
    shorter ones get zeros, which the mask of the family tells from the rest.

    Args:
        size: height and width of the pictures in pixels, which some families encode too.
        options: settings of the text encoders.
    """

    pipeline: Any
    family: Family
    size: tuple[int, int]
    options: TextOptions = field(default_factory=TextOptions)
    cache: dict[str, tuple[Any, Any]] = field(default_factory=dict, repr=False)
    """(condition, negative condition) of the CONDITIONS_KEPT most recent prompts, the latest last."""

    def __call__(self, prompts: Sequence[str], device: torch.device) -> tuple[Condition, Condition | None]:
        """Encode prompts: (conditions, negative conditions or None), each tensor [batch, ..], on `device`.

        The text encoders see each of the last CONDITIONS_KEPT prompts once. A prompt longer than they take is truncated as the
        pipeline truncates it, with a warning.
        """
        for prompt in dict.fromkeys(prompts):
            if prompt in self.cache:
                self.cache[prompt] = self.cache.pop(prompt)  # the latest is last
                continue
            with torch.no_grad(), explained("the pipeline's text encoder"):
                self._warn_of_length(prompt)
                encoded = self.family.encode(self.pipeline, [prompt], self.size, self.options)
                pair = on_device(encoded, torch.device("cpu"))
            # the negative condition does not depend on the prompt: all share the first one
            self.cache[prompt] = pair[0], next(iter(self.cache.values()), pair)[1]
        several = (joined([self.cache[prompt][i] for prompt in prompts]) for i in (0, 1))
        condition, negative = on_device(tuple(several), device)
        for prompt in list(self.cache)[:-CONDITIONS_KEPT]:
            del self.cache[prompt]
        return condition, negative

    def _warn_of_length(self, prompt: str) -> None:
        """Warn if a tokenizer truncates a prompt: CLIP takes 77 tokens, T5 as many as the pipeline says."""
        cut: list[tuple[str, int, int]] = []
        whole: list[str] = []
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            tokenizer = getattr(self.pipeline, name, None)
            if tokenizer is None or getattr(self.pipeline, name.replace("tokenizer", "text_encoder"), None) is None:
                continue
            most = tokenizer.model_max_length
            if most > CLIP_TOKENS and self.family.max_sequence_length is not None:
                most = self.options.max_sequence_length or self.family.max_sequence_length
            count = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if count > most:
                cut.append((name, most, count))
            else:
                whole.append(name)
        for name, most, count in cut[:1]:
            rest = f"the rest is seen by {' and '.join(whole)} alone" if whole else "the rest is not seen"
            text = f"prompt {prompt[:40]!r}: {name} takes {most} of its {count} tokens, {rest}"
            warnings.warn(text, Note, stacklevel=5)


def on_device(conditions: Any, device: torch.device) -> Any:
    """Move all tensors of nested conditions to a device."""
    return tree_map_only(Tensor, lambda part: part.to(device), conditions)
