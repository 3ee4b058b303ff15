"""A kind of condition: the classes of odd numbers."""

from collections.abc import Sequence
from typing import Literal

from tiltflow.conditions.prompts import Prompt
from tiltflow.settings import Settings


class Odd(Settings):
    """Every second class of a class-conditional model."""

    name: Literal["odd"] = "odd"

    def items(self, class_names: Sequence[str], seed: int) -> tuple[list[Prompt], list[Prompt]]:
        """The classes that are tuned and measured; none is held out."""
        return [Prompt(name, {"label": i}) for i, name in enumerate(class_names) if i % 2], []
