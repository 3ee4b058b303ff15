"""A reward of your own: any Python function of a batch of images."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import ClassVar, Literal, cast

import torch
from pydantic import field_validator

from tiltflow.errors import InputError, did_you_mean
from tiltflow.reward import Reward
from tiltflow.settings import Settings


class Function(Settings):
    """Your function gets x [batch, *event] and returns [batch] floats, higher is better, in any unit.

    Whether it has a gradient shows when a method that needs one asks for it.
    """

    differentiable: ClassVar[bool] = True
    unit: ClassVar[str] = "reward"

    name: Literal["function"] = "function"
    path: str
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
        """Import the function. Raises InputError if the module, the function or something they import is missing."""
        module_name, _, name = self.path.partition(":")
        module = import_module(module_name)
        if not hasattr(module, name):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise InputError(f"reward {self.path}: {module_name} has no {name!r}{did_you_mean(name, known)}")
        function = getattr(module, name)
        if not callable(function):
            raise InputError(f"reward {self.path}: {name!r} must be a function, is {type(function).__name__}")
        return cast(Reward, function)


def import_module(name: str) -> ModuleType:
    """The module called `name`. The current directory is searched last, so that nothing in it hides an installed package."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for good: the function may import its neighbours when it is called
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"there is no module {error.name!r} on the Python path or in {os.getcwd()}") from None
        raise InputError(f"module {name!r} cannot be imported ({error})") from error
    except Exception as error:  # whatever the user's code does while it is imported
        raise InputError(f"module {name!r} cannot be imported ({type(error).__name__}: {error})") from error
