"""Parts that a recipe names: reward `class-log-odds` is the class `ClassLogOdds` in `tiltflow/rewards/class_log_odds.py`.

Adding a reward, a method or a network is adding that one file. Nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from tiltflow.errors import InputError, did_you_mean
from tiltflow.settings import Settings, first_problem


def names(package: str) -> list[str]:
    """The names of the parts in `tiltflow.<package>`, in alphabetical order."""
    path = importlib.import_module(f"tiltflow.{package}").__path__
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(path))


def find(package: str, name: str) -> type[Settings]:
    """The settings class of the part called `name`. Raises InputError, with the nearest name, if there is none."""
    if name not in names(package):
        raise InputError(f"there is no {package.removesuffix('s')} {name!r}{did_you_mean(name, names(package))}")
    module = importlib.import_module(f"tiltflow.{package}.{name.replace('-', '_')}")
    part: type[Settings] = getattr(module, "".join(word.capitalize() for word in name.split("-")))
    return part


def part_of(package: str) -> Callable[[Any], Any]:
    """A pydantic validator: a name, or a mapping with a `name`, becomes the settings of that part."""

    def build(value: Any) -> Any:
        if isinstance(value, Settings):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError(f"needs a name; known: {', '.join(names(package))}")
        try:
            part = find(package, value["name"])
        except InputError as error:
            raise ValueError(str(error)) from None
        try:
            return part.model_validate(value)
        except ValidationError as error:
            # keeps the full location of the problem: settings.first_problem puts this part's own before it
            raise PydanticCustomError("part", "{problem}", {"problem": first_problem(part, error)}) from None

    return build


def import_function(path: str, what: str) -> Callable[..., Any]:
    """The user's function at `package.module:function`, from the Python path or the current directory.

    Raises InputError, naming it as `what`, if the module, the function or something they import is missing.
    """
    module_name, _, name = path.partition(":")
    module = import_module(module_name)
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{what} {path}: {module_name} has no {name!r}{did_you_mean(name, known)}")
    function = getattr(module, name)
    if not callable(function):
        raise InputError(f"{what} {path}: {name!r} must be a function, is {type(function).__name__}")
    return function  # type: ignore[no-any-return]


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
