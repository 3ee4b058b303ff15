"""Sources of the model of a recipe, one kind a file: a class of settings named after the file.

A recipe says `model: NAME_OR_FOLDER`, or a mapping with the name of the kind: `{name: network, path: .., adapter: ..}`. The
name can be left out of a mapping with `path` or `diffusers`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, runtime_checkable

from pydantic import BeforeValidator

from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.trainable import Adapter
from tiltflow.plugins import find, part_of
from tiltflow.settings import External, Settings

M = TypeVar("M", bound=GenerativeModel)


@runtime_checkable
class ModelSource(Protocol[M]):
    """Settings of a kind of model."""

    @property
    def title(self) -> str:
        """Name of the model in a report."""
        ...

    @property
    def prompted(self) -> bool:
        """True if conditions are prompts; see `GenerativeModel`."""
        ...

    @property
    def adapter(self) -> Adapter | None:
        """LoRA that is trained in the model; None trains a copy of its network."""
        ...

    def load(self, device: str) -> M:
        """Load the untuned model. Raises InputError if it cannot be loaded."""
        ...

    def load_tuned(self, base: M, folder: Path, seed: int) -> tuple[M, M]:
        """Return (base, tuned) of a run with its tuned model in `folder`; they may share a network.

        Raises InputError if it cannot be loaded, or belongs to another model.
        """
        ...

    def keep(self, folder: Path) -> None:
        """Copy the model into a folder of a run, if it could not be loaded again otherwise and the folder does not exist."""
        ...

    def bytes_to_keep(self, folder: Path) -> int:
        """Return the number of bytes that `keep` will write."""
        ...

    def kept_in(self, folder: Path) -> ModelSource[M]:
        """Return the source to load from once `keep` was called with this folder."""
        ...


def source_of(value: Any) -> ModelSource[Any]:
    """Return settings of a source; a text is the path of a network."""
    found: ModelSource[Any] = find("models.sources", "network")(path=value) if isinstance(value, str) else value
    return found


def _source(value: Any) -> Any:
    """Validate mappings as settings of a source; return settings and texts unchanged."""
    if isinstance(value, (str, Settings)):
        return value
    if not isinstance(value, dict):
        raise ValueError("must be a name, a folder, or a mapping with `diffusers` or `path`")
    name = value.get("name", "network" if "path" in value and "diffusers" not in value else "diffusers")
    return part_of("models.sources")({**value, "name": name})


if TYPE_CHECKING:
    ModelName = str | ModelSource[Any]
else:
    ModelName = Annotated[Any, BeforeValidator(_source), External()]
"""Type of a setting that is a model."""
