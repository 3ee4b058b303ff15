"""Likeness of an edit to the picture that was edited, by CLIP: what keeps the rest of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from tiltflow.flows.precision import Dtype
from tiltflow.pictures import Picture, batch_of
from tiltflow.rewards import Metadata, Reward
from tiltflow.rewards.backbones.clip import Clip
from tiltflow.rewards.functions.prompted import OfPrompts, sources_of
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

        known: dict[tuple[Picture, torch.Size], torch.Tensor] = {}  # features of the pictures that were edited

        def similarity(images: torch.Tensor, metadata: Sequence[Metadata]) -> torch.Tensor:
            keys = [(source, images.shape[-2:]) for source in sources_of(metadata)]
            if new := [key for key in dict.fromkeys(keys) if key not in known]:
                sources = batch_of([source for source, _ in new], *images.shape[-2:])
                with torch.no_grad():
                    known.update(zip(new, clip.image_features(sources.to(images)), strict=True))
            return 100 * (clip.image_features(images) * torch.stack([known[key] for key in keys])).sum(1)

        return OfPrompts(similarity, ("metadata",))
