"""CLIPScore: how well a picture fits its prompt."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from tiltflow.flows.precision import Dtype
from tiltflow.rewards import Reward
from tiltflow.rewards.backbones.clip import Clip
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.rewards.functions.prompted import OfPrompts
from tiltflow.settings import PathOrName, Settings


class ClipScore(Settings):
    """CLIPScore (2104.08718) without its cut at 0: 100 cos(picture, prompt), 20 to 35 for most pictures."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "points"

    name: Literal["clip-score"] = "clip-score"
    model: PathOrName = "openai/clip-vit-large-patch14"
    """The CLIP model: a folder or a name on the hub."""
    dtype: Dtype = "float32"
    """dtype of its weights."""

    @property
    def description(self) -> str:
        return f"100 times the cosine between the features of a picture and of its prompt, by {self.model}; 20 to 35 for most"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        clip = Clip.load(self.model, device, self.dtype)
        return OfPrompts(of_frames(lambda images, prompts: 100 * clip.similarity(images, prompts)))
