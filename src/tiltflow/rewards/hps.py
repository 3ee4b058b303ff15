"""HPS: which picture of a prompt people would prefer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator

from tiltflow.errors import InputError
from tiltflow.flows.precision import Dtype
from tiltflow.rewards import Reward
from tiltflow.rewards.backbones.clip import Clip
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.rewards.functions.prompted import OfPrompts
from tiltflow.settings import PathOrName, Settings

FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
"""Names of the published files, of xswu/HPSv2 on the hub."""


class Hps(Settings):
    """HPS v2 and v2.1 (2306.09341): cos(picture, prompt) of a CLIP ViT-H/14 that was trained on preferences. Papers report it
    times 1, 10 or 100."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "points"

    name: Literal["hps"] = "hps"
    version: Literal["v2", "v2.1"] = "v2.1"
    """v2.1 was trained on more and better preferences; its scores are not those of v2."""
    model: PathOrName = FILES["v2.1"]
    """The published file, by default `HPS_v2.1_compressed.pt` or `HPS_v2_compressed.pt` in the working directory, or its
    tensors as safetensors; or a CLIPModel of transformers with its weights: a folder or a name on the hub."""
    tokenizer: PathOrName | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """A folder or a name on the hub with its tokenizer; null for the folder of the model."""
    dtype: Dtype = "float32"
    """dtype of its weights."""

    @model_validator(mode="before")
    @classmethod
    def _file_of_the_version(cls, values: Any) -> Any:
        file = FILES.get(values.get("version", "v2.1")) if isinstance(values, dict) else None
        return values if file is None else {"model": file, **values}

    @model_validator(mode="after")
    def _check_version(self) -> Hps:
        for version, file in FILES.items():
            if Path(self.model).name == file and version != self.version:
                raise ValueError(f"model {self.model} is HPS {version}, not {self.version}; set version: {version}")
        return self

    @property
    def description(self) -> str:
        return f"preference of people for a picture of its prompt, HPS {self.version} by {self.model}; 0.2 to 0.35 for most"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        is_file = Path(self.model).is_file()
        if not is_file and Path(self.model).name in FILES.values():
            raise InputError(f"reward hps: there is no file {self.model}; it is one of xswu/HPSv2 on the hub")
        load = Clip.load_open_clip if is_file else Clip.load
        return OfPrompts(of_frames(load(self.model, device, self.dtype, self.tokenizer).similarity))
