"""HPS: which picture of a prompt people would prefer."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch

from tiltflow.flows.precision import Dtype
from tiltflow.rewards import Reward
from tiltflow.rewards.backbones.clip import Clip
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.rewards.functions.prompted import OfPrompts
from tiltflow.settings import PathOrName, Settings


class Hps(Settings):
    """HPS v2.1 (2306.09341): cos(picture, prompt) of a CLIP ViT-H/14 that was trained on preferences. Papers report it times
    1, 10 or 100."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "points"

    name: Literal["hps"] = "hps"
    model: PathOrName
    """The published file, `HPS_v2.1_compressed.pt`, or its tensors as safetensors; or a CLIPModel of transformers with its
    weights: a folder or a name on the hub."""
    tokenizer: PathOrName | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """A folder or a name on the hub with its tokenizer; null for the folder of the model."""
    dtype: Dtype = "float32"
    """dtype of its weights."""

    @property
    def description(self) -> str:
        return f"preference of people for a picture of its prompt, by {self.model}; 0.2 to 0.35 for most"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        load = Clip.load_open_clip if Path(self.model).is_file() else Clip.load
        return OfPrompts(of_frames(load(self.model, device, self.dtype, self.tokenizer).similarity))
