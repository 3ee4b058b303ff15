"""Which picture of a prompt people would prefer, by HPS."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from tiltflow.clip import Clip
from tiltflow.reward import OfPrompts, Reward
from tiltflow.settings import Settings


class Hps(Settings):
    """HPS v2.1 (2306.09341): cos(picture, prompt) of a CLIP ViT-H/14 that was trained on preferences; papers print it times 1,
    10 or 100. The published file is in the format of open_clip; `model` is one that was converted to transformers."""

    differentiable: ClassVar[bool] = True
    unit: ClassVar[str] = "points"

    name: Literal["hps"] = "hps"
    model: str
    """A CLIPModel of transformers with the weights of HPS v2.1: a folder or a name on the hub."""
    tokenizer: str | None = None
    """Where its tokenizer is, if not in the same place."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @property
    def description(self) -> str:
        return f"preference of people for a picture of its prompt, by {self.model}; 0.2 to 0.35 for most"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        return OfPrompts(Clip.load(self.model, device, self.dtype, self.tokenizer).similarity)
