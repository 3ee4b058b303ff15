"""A kind of condition: the classes of odd numbers."""

from collections.abc import Sequence
from typing import Literal

from tiltflow.conditions import Item
from tiltflow.settings import Settings


class Odd(Settings):
    """Every second class of a class-conditional model."""

    name: Literal["odd"] = "odd"

    def items(self, class_names: Sequence[str], seed: int) -> tuple[list[Item], list[Item]]:
        """The classes that are tuned and measured; none is held out."""
        return [Item(name, {"label": i}) for i, name in enumerate(class_names) if i % 2], []
