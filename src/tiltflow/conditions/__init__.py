"""What a sample is asked for, one kind a file: a class of settings named after the file, with `items()`.

Prompts, class labels; a size, an observation or whatever else in a file of its own. An item is a `Prompt`: a text, and metadata
that the model knows how to read.
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
        """(what is tuned, what is held out for the evaluation). Held out is nothing where the first are all that there are, as
        classes are: they are then measured themselves.

        Args:
            class_names: of the model, if it is class-conditional.

        Raises InputError for items that there are not.
        """
        ...


if TYPE_CHECKING:
    NamedConditions = Conditions
else:
    NamedConditions = Annotated[Any, BeforeValidator(part_of("conditions"))]
"""The type of a setting that is a kind of condition: its name, or a mapping with its name and settings."""
