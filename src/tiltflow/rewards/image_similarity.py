"""Likeness of an edit to the picture that was edited, by CLIP: what keeps the rest of it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from tiltflow.flows.precision import Dtype
from tiltflow.rewards import Reward
from tiltflow.rewards.backbones.clip import Clip
from tiltflow.rewards.functions.prompted import OfPrompts
from tiltflow.settings import PathOrName, Settings


class ImageSimilarity(Settings):
    """100 cos(edit, picture that was edited), in the features of CLIP: 100 for no edit at all."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "points"

    name: Literal["image-similarity"] = "image-similarity"
    model: PathOrName = "openai/clip-vit-large-patch14"
    """The CLIP model: a folder or a name on the hub."""
    dtype: Dtype = "float32"
    """dtype of its weights."""

    @property
    def description(self) -> str:
        return f"100 times the cosine between the features of an edit and of the picture that was edited, by {self.model}"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        clip = Clip.load(self.model, device, self.dtype)

        def similarity(images: torch.Tensor, sources: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                expected = clip.image_features(sources)
            return 100 * (clip.image_features(images) * expected).sum(1)

        return OfPrompts(similarity, ("sources",))
