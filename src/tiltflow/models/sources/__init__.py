"""Where the model of a recipe comes from, one kind a file: a class of settings named after the file.

A recipe says `model: NAME_OR_FOLDER`, or a mapping with the name of the kind: `{name: network, path: .., adapter: ..}`. With
`path` or `diffusers` in it, the name can be left out.
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
        """The name of the model, as a report says it."""
        ...

    @property
    def prompted(self) -> bool:
        """Whether samples are asked for by prompts; see `GenerativeModel`."""
        ...

    @property
    def adapter(self) -> Adapter | None:
        """The LoRA that is trained in the model; None trains a copy of its network."""
        ...

    def load(self, device: str) -> M:
        """The untuned model. Raises InputError if it cannot be had."""
        ...

    def load_tuned(self, base: M, folder: Path, seed: int) -> tuple[M, M]:
        """(base, tuned) of a run whose tuned model lies in `folder`; they may share a network. Raises InputError if it is not
        there, or is another."""
        ...

    def keep(self, folder: Path) -> None:
        """Copy what cannot be had again into a folder of a run, if it is not there already."""
        ...

    def bytes_to_keep(self, folder: Path) -> int:
        """What `keep` will write."""
        ...

    def kept_in(self, folder: Path) -> ModelSource[M]:
        """The source of a run, whose `keep` was given this folder."""
        ...


def source_of(value: Any) -> ModelSource[Any]:
    """Where the model of a recipe comes from: a text is the path of a network."""
    found: ModelSource[Any] = find("models.sources", "network")(path=value) if isinstance(value, str) else value
    return found


def _source(value: Any) -> Any:
    """Mappings as the settings of a source; texts as they are."""
    if isinstance(value, (str, Settings)):
        return value
    if not isinstance(value, dict):
        raise ValueError("must be a name or a folder, or a mapping with `diffusers` or `path`")
    name = value.get("name", "network" if "path" in value and "diffusers" not in value else "diffusers")
    return part_of("models.sources")({**value, "name": name})


if TYPE_CHECKING:
    ModelName = str | ModelSource[Any]
else:
    ModelName = Annotated[Any, BeforeValidator(_source), External()]
"""The type of a setting that is a model."""
