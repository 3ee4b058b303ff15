"""PickScore: which picture of a prompt people would pick."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from tiltflow.flows.precision import Dtype
from tiltflow.rewards import Reward
from tiltflow.rewards.backbones.clip import Clip
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.rewards.functions.prompted import OfPrompts
from tiltflow.settings import PathOrName, Settings


class PickScore(Settings):
    """PickScore (2305.01569): exp(logit_scale) cos(picture, prompt) of a CLIP that was trained on choices of people."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "points"

    name: Literal["pick-score"] = "pick-score"
    model: PathOrName = "yuvalkirstain/PickScore_v1"
    """The CLIP model: a folder or a name on the hub."""
    tokenizer: PathOrName | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """A folder or a name on the hub with its tokenizer; null for that of the model."""
    dtype: Dtype = "float32"
    """dtype of its weights."""

    @property
    def description(self) -> str:
        return f"preference of people for a picture of its prompt, by {self.model}; 17 to 24 for most"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        clip = Clip.load(self.model, device, self.dtype, self.tokenizer)
        scale = clip.temperature
        return OfPrompts(of_frames(lambda images, prompts: scale * clip.similarity(images, prompts)))
