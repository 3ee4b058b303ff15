"""Conditions of samples, one kind a file: a class of settings named after the file, with `items()`.

Prompts and class labels are here; a size, an observation or another kind is one more file. An item is a `Prompt`: a text, and
metadata that the model reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BeforeValidator

from tiltflow.plugins import part_of

if TYPE_CHECKING:
    from tiltflow.conditions.prompts import Prompt


class Conditions(Protocol):
    """Settings of a kind of condition."""

    def items(self, class_names: Sequence[str], seed: int, /) -> tuple[list[Prompt], list[Prompt]]:
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
