"""A network on tensors, from a model folder or, by name, of those that ship with tiltflow."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar, Literal

from tiltflow.files import write_folder
from tiltflow.models.model import Model, load
from tiltflow.models.model_folder import model_folder
from tiltflow.models.trainable import Adapter
from tiltflow.settings import PathOrName, Settings
from tiltflow.shipped import ships


class Network(Settings):
    """A network on tensors."""

    name: Literal["network"] = "network"
    path: PathOrName
    """Name of a model that ships with tiltflow, or a model folder."""
    adapter: Adapter | None = None
    """LoRA that is trained in the frozen network, and merged into it when the model is saved; null trains a copy of the whole
    network."""

    prompted: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """Name of the model in a report."""
        return self.path

    def load(self, device: str) -> Model:
        """Load the untuned model. Raises InputError if it cannot be loaded."""
        return load(self.path, device)

    def load_tuned(self, base: Model, folder: Path, seed: int) -> tuple[Model, Model]:
        """Return (base, tuned) of a run with its tuned model in `folder`. Raises InputError if it cannot be loaded."""
        return base, load(folder, base.device)

    def keep(self, folder: Path) -> None:
        """Copy the model into a folder of a run, unless it ships with tiltflow or the folder exists."""
        source = model_folder(self.path)
        if self.bytes_to_keep(folder):
            write_folder(folder, lambda draft: shutil.copytree(source, draft, dirs_exist_ok=True))

    def bytes_to_keep(self, folder: Path) -> int:
        """Return the number of bytes that `keep` will write."""
        source = model_folder(self.path)
        if ships(source) or folder.exists():
            return 0
        return sum(path.stat().st_size for path in source.iterdir())

    def kept_in(self, folder: Path) -> Network:
        """Return the copy as a source, if there is one."""
        return self.model_copy(update={"path": str(folder)}) if folder.exists() else self
