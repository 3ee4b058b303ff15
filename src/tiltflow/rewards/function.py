"""A reward of your own: any Python function of a batch of images."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import field_validator

from tiltflow.plugins import import_function
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.settings import FunctionOrName, Settings


class Function(Settings):
    """Your function gets x [batch, *event] and returns [batch] floats, higher is better, in any unit. If it has an argument
    `prompts` or `metadata`, these are passed by name, one for each picture of a text-to-image model: a text, and a mapping of
    the other columns of its file; `sources` are the pictures that were edited, [batch, 3, height, width] like x. It may
    return (rewards, info), as DDPO's do; the second is ignored.

    With an argument `latents` in place of the images it gets what they are decoded from, in training and in the evaluation
    alike, and training decodes nothing.

    x is a copy, about [-1, 1] for pictures, [batch, 3, height, width], and for videos, [batch, frames, 3, height, width]. A
    missing gradient is refused where a method needs one.
    """

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "reward"

    name: Literal["function"] = "function"
    path: FunctionOrName
    """`package.module:function`, from the Python path or the current directory."""

    @field_validator("path")
    @classmethod
    def _module_and_function(cls, path: str) -> str:
        module, _, function = path.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), function)):
            raise ValueError(f"must read package.module:function, got {path!r}")
        return path

    @property
    def description(self) -> str:
        return f"value of {self.path}; higher is better"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Import the function. Raises InputError if the module, the function or something they import is missing, or if it has
        other arguments."""
        return from_function(import_function(self.path, "reward"), f"reward {self.path}")
