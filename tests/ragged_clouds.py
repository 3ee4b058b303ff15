"""A source of models, as a file of `models/sources/` or of somebody else's package is made."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from kinds import Ragged
from safetensors.torch import load_file

from tiltflow.models.trainable import Adapter
from tiltflow.settings import Settings


class RaggedClouds(Settings):
    """Clouds of two or three points."""

    name: Literal["ragged-clouds"] = "ragged-clouds"
    shift: float = 0.0
    """Of the first coordinate of the mean."""

    prompted: ClassVar[bool] = False
    adapter: ClassVar[Adapter | None] = None

    @property
    def title(self) -> str:
        return "clouds"

    def load(self, device: str) -> Ragged:
        model = Ragged.make()
        model.flow.network.mean.data[:, 0, 0] = self.shift  # type: ignore[attr-defined]
        return model

    def load_tuned(self, base: Ragged, folder: Path, seed: int) -> tuple[Ragged, Ragged]:
        tuned = Ragged.make()
        tuned.flow.network.load_state_dict(load_file(folder / "model.safetensors"))  # type: ignore[attr-defined]
        return base, tuned

    def keep(self, folder: Path) -> None:
        """Nothing is copied."""

    def bytes_to_keep(self, folder: Path) -> int:
        return 0

    def kept_in(self, folder: Path) -> RaggedClouds:
        return self
