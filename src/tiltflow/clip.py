"""CLIP models of transformers, as rewards and judges need them: features of pictures, with gradient, and of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiltflow.errors import InputError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Clip:
    """A CLIP model and its tokenizer; features are of length 1, in float32."""

    model: Any
    tokenizer: Any
    texts: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Features of the prompts seen so far."""

    @classmethod
    def load(cls, path: str, device: torch.device | str = "cpu", dtype: str = "float32", tokenizer: str | None = None) -> Clip:
        """From a folder or a name on the hub. Raises InputError if it cannot be had."""
        try:
            from transformers import CLIPModel, CLIPTokenizer
        except ImportError:
            raise InputError("transformers is not installed: pip install 'tiltflow[diffusers]'") from None
        try:
            model: Any = CLIPModel.from_pretrained(path, dtype=getattr(torch, dtype), use_safetensors=True)
            words = CLIPTokenizer.from_pretrained(tokenizer or path)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"CLIP model {path}: cannot be loaded ({str(error).strip().splitlines()[0]})") from None
        return cls(model.to(device).requires_grad_(False).eval(), words)

    def image_features(self, images: Tensor) -> Tensor:
        """[batch, width] for images [batch, 3, height, width] in [-1, 1], with their gradient."""
        side = self.model.config.vision_config.image_size
        pixels = resized(images, side).to(self.model.dtype)
        return F.normalize(pooled(self.model.get_image_features(pixel_values=pixels)).float(), dim=1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """[len(prompts), width]. A prompt is computed once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.texts]
        if new:
            tokens = self.tokenizer(new, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
            features = F.normalize(pooled(self.model.get_text_features(**tokens)).float(), dim=1)
            self.texts.update(zip(new, features, strict=True))
        return torch.stack([self.texts[prompt] for prompt in prompts])

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of the angle between the features of a picture and of its prompt: [batch]."""
        return (self.image_features(images) * self.text_features(prompts)).sum(1)

    @property
    def temperature(self) -> float:
        """What the model multiplies cosines with: exp(logit_scale)."""
        scale: float = self.model.logit_scale.exp().item()
        return scale


def pooled(output: Any) -> Tensor:
    """The features of transformers' `get_image_features`, which are a tensor or, in later versions, in an output object."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features


def resized(images: Tensor, side: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Images [batch, 3, height, width] in [-1, 1] as CLIP was shown them: the shorter side resized to `side` (bicubic, with
    antialiasing), the middle cut out, normalised. Values outside of [-1, 1] are cut off, as in a picture on disk."""
    height, width = images.shape[-2:]
    scale = side / min(height, width)
    size = [max(side, round(length * scale)) for length in (height, width)]
    x = F.interpolate((images.clamp(-1, 1) + 1) / 2, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    x = x[..., top : top + side, left : left + side]
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]
