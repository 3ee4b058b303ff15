"""A network on tensors: one that ships with tiltflow, by name, or a model folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar, Literal

from tiltflow.files import write_folder
from tiltflow.models.model import Model, load, model_folder
from tiltflow.models.trainable import Adapter
from tiltflow.settings import PathOrName, Settings
from tiltflow.shipped import ASSETS


class Network(Settings):
    """A network on tensors."""

    name: Literal["network"] = "network"
    path: PathOrName
    """A model that ships with tiltflow, or a model folder."""
    adapter: Adapter | None = None
    """Train a LoRA beside the frozen network; null trains a copy of all of it. What is saved is one network, with the LoRA
    merged in."""

    prompted: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """The name of the model, as a report says it."""
        return self.path

    def load(self, device: str) -> Model:
        """The untuned model. Raises InputError if it cannot be had."""
        return load(self.path, device)

    def load_tuned(self, base: Model, folder: Path, seed: int) -> tuple[Model, Model]:
        """(base, tuned) of a run whose tuned model lies in `folder`. Raises InputError if it is not there."""
        return base, load(folder, base.device)

    def keep(self, folder: Path) -> None:
        """Copy the model into a folder of a run, unless it ships with tiltflow or is there already."""
        source = model_folder(self.path)
        if self.bytes_to_keep(folder):
            write_folder(folder, lambda draft: shutil.copytree(source, draft, dirs_exist_ok=True))

    def bytes_to_keep(self, folder: Path) -> int:
        """What `keep` will write."""
        source = model_folder(self.path)
        if source.is_relative_to(ASSETS) or folder.exists():
            return 0
        return sum(path.stat().st_size for path in source.iterdir())

    def kept_in(self, folder: Path) -> Network:
        """The copy, if there is one."""
        return self.model_copy(update={"path": str(folder)}) if folder.exists() else self
