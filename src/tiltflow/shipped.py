"""Names and paths: `digits-flow` is the model that ships with tiltflow, `./digits-flow` the user's folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from tiltflow.errors import Note

ASSETS = Path(str(resources.files("tiltflow"))) / "assets"
INDEX = "model_index.json"
"""File that marks a folder as a pipeline of diffusers."""


def assets(marker: str) -> dict[str, Path]:
    """The folders inside the package that hold a file called `marker`, by name."""
    return {folder.name: folder for folder in sorted(ASSETS.iterdir()) if (folder / marker).exists()}


def by_name(name_or_path: str | Path, shipped: Mapping[str, Path], what: str) -> Path | None:
    """Place of what ships with tiltflow under this name; None for a path and for any other name.

    A str without a separator is a name first. A Path is always a path. If the current directory has a file or folder of that
    name too, a warning says which one is used and how to write the other.

    Args:
        what: a word for such things, as in "model".
    """
    if isinstance(name_or_path, Path) or any(separator in name_or_path for separator in (os.sep, os.altsep) if separator):
        return None
    if name_or_path in shipped and os.path.lexists(name_or_path):
        own = f".{os.sep}{name_or_path}"
        warnings.warn(
            f"{name_or_path!r} is the {what} that ships with tiltflow; write {own} for the one in this folder",
            Note,
            stacklevel=3,
        )
    return shipped.get(name_or_path)
