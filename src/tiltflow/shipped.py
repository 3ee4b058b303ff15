"""Names and paths: `digits-flow` is the model that ships with tiltflow, `./digits-flow` the user's folder."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from tiltflow.errors import InputError, Note

ASSETS = Path(str(resources.files("tiltflow"))) / "assets"
LARGE = ("digits-diffusion", "qm9-flow", "qm9-isomers-flow", "tiles-pipeline")
"""What is in the distribution tiltflow-assets, so that the wheel of tiltflow itself is small; a clone has both."""
INDEX = "model_index.json"
"""File that marks a folder as a pipeline of diffusers."""


def places() -> list[Path]:
    """The folders in which what ships with tiltflow lies: in the package, and in tiltflow-assets where that is installed."""
    found = importlib.util.find_spec("tiltflow_assets")
    return [ASSETS, *map(Path, (found and found.submodule_search_locations) or ())]


def assets(*markers: str) -> dict[str, Path]:
    """The folders that ship and hold a file called as one of `markers`, by name."""
    folders = sorted((folder for place in places() for folder in place.iterdir()), key=lambda folder: folder.name)
    return {folder.name: folder for folder in folders if any((folder / marker).exists() for marker in markers)}


def ships(folder: Path) -> bool:
    """Whether a folder is one of those that ship with tiltflow."""
    return any(folder.is_relative_to(place) for place in places())


def asset(name_or_path: str | Path, what: str, *markers: str) -> Path | None:
    """Folder that ships under this name and holds a file called as one of `markers`, as `by_name` finds it.

    Raises InputError if it is one of tiltflow-assets, which is not installed.
    """
    if name_or_path in LARGE and len(places()) == 1:
        raise InputError(
            f"{what} {name_or_path!r} is in the package tiltflow-assets, which is not installed: pip install"
            " 'tiltflow[assets]', or ./src/tiltflow_assets in tiltflow's source folder"
        )
    return by_name(name_or_path, assets(*markers), what)


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
            stacklevel=4,
        )
    return shipped.get(name_or_path)
