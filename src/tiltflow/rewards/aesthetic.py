"""LAION's aesthetic predictor: how beautiful people find a picture."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from tiltflow.errors import InputError
from tiltflow.flows.precision import Dtype
from tiltflow.rewards import Reward
from tiltflow.rewards.backbones.clip import Clip
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.settings import PathOrName, Settings
from tiltflow.tensor_file import read_tensors
from tiltflow.user_code import refused


class Aesthetic(Settings):
    """LAION's aesthetic predictor, version 2: linear layers on the normalised features of CLIP ViT-L/14; ratings of 1 to 10."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "points of ten"

    name: Literal["aesthetic"] = "aesthetic"
    model: PathOrName = "openai/clip-vit-large-patch14"
    """The CLIP model: a folder or a name on the hub."""
    head: PathOrName
    """The file `sac+logos+ava1-l14-linearMSE.pth` of improved-aesthetic-predictor, or its tensors as safetensors."""
    dtype: Dtype = "float32"
    """dtype of its weights."""

    @property
    def description(self) -> str:
        return "rating that LAION's aesthetic predictor gives a picture, 1 to 10, 5 to 7 for most"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        clip, head = Clip.load(self.model, device, self.dtype), load_head(Path(self.head)).to(device)
        width, expected = clip.model.config.projection_dim, head[0].in_features
        if width != expected:
            raise InputError(f"reward.head {self.head}: takes features of width {expected}, {self.model} has {width}")

        def aesthetic(images: Tensor) -> Tensor:
            features = clip.image_features(images)
            rating: Tensor = head.to(features.dtype)(features).squeeze(1)
            return rating

        return of_frames(aesthetic)


@refused("reward.head: is not the aesthetic predictor")
def load_head(path: Path) -> nn.Sequential:
    """The predictor's layers, without the dropout between them. Raises InputError if they cannot be read."""
    weights = read_tensors(path, "reward.head")
    names = [f"layers.{i}" for i in (0, 2, 4, 6, 7)]
    if any(f"{name}.{part}" not in weights for name in names for part in ("weight", "bias")):
        raise InputError(
            f"reward.head {path}: is not the aesthetic predictor, it needs tensors {names[0]}.weight to {names[-1]}.bias"
        )
    layers = []
    for name in names:
        weight = weights[f"{name}.weight"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": weights[f"{name}.bias"]})
        layers.append(layer)
    return nn.Sequential(*layers).requires_grad_(False).eval()
