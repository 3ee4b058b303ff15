"""Conditions of samples, one kind a file: a class of settings named after the file, with `items()`.

Prompts, class labels and observations are here; a size or another kind is one more file. An `Item` is a text, and
metadata that models and rewards read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BeforeValidator

from tiltflow.plugins import part_of


@dataclass(frozen=True)
class Item:
    """What one sample is asked for: a prompt, or the name of a class, with its metadata."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)


class Conditions(Protocol):
    """Settings of a kind of condition."""

    def items(self, class_names: Sequence[str], seed: int, /) -> tuple[Sequence[Item], Sequence[Item]]:
        """Return (items for training, items held out for the evaluation). The second list is empty if the first has all items
        that exist, as for classes: the evaluation then uses the first.

        Args:
            class_names: of a class-conditional model; empty for another.

        Raises InputError for items that do not exist.
        """
        ...


if TYPE_CHECKING:
    NamedConditions = Conditions
else:
    NamedConditions = Annotated[Any, BeforeValidator(part_of("conditions"))]
"""The type of a setting that is a kind of condition: its name, or a mapping with its name and settings."""
