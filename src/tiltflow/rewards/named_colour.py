"""Share of a picture that has the colour named in its prompt."""

# Mutation tests: test_rewards.py

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from PIL import ImageColor
from pydantic import Field
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.rewards.functions.prompted import OfPrompts
from tiltflow.settings import Settings


class NamedColour(Settings):
    """Mean over the pixels of exp(-|rgb - colour|^2 / 2 width^2), rgb in [0, 1]: 0 to 1. The colour is the first word of the
    prompt that is a colour of CSS."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "share of the picture"

    name: Literal["named-colour"] = "named-colour"
    width: Annotated[float, Field(gt=0)] = 0.25
    """Tolerance: a pixel at this distance from the colour counts 0.6, at twice the distance 0.14."""

    @property
    def description(self) -> str:
        return f"share of the picture that has the colour named in its prompt, within {self.width:g}; 0 to 1"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        def named_colour(images: Tensor, prompts: Sequence[str]) -> Tensor:
            colours = images.new_tensor([colour_in(prompt) for prompt in prompts])
            distance = ((images + 1) / 2 - colours[:, :, None, None]).square().sum(1)
            return torch.exp(-distance / (2 * self.width**2)).mean((1, 2))

        return OfPrompts(of_frames(named_colour))


def colour_in(prompt: str) -> list[float]:
    """The first colour that a prompt names, rgb in [0, 1]. Raises InputError if there is none.

    >>> colour_in("a cat on a red background")
    [1.0, 0.0, 0.0]
    """
    for word in prompt.lower().replace(",", " ").split():
        if word in ImageColor.colormap:
            return [value / 255 for value in ImageColor.getrgb(word)[:3]]
    raise InputError(f"reward named-colour: the prompt {prompt!r} names no colour, such as red or teal")
