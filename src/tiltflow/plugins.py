"""Parts that a recipe names: reward `class-log-odds` is the class `ClassLogOdds` in `tiltflow/rewards/class_log_odds.py`, and
solver `dpm-solver++` the class `DpmSolverPlusPlus` in `tiltflow/samplers/solvers/dpm_solver_plus_plus.py`.

To add a reward, a method or a network is to add one such file; in a package of your own, a file and an entry point of the group
`tiltflow.rewards` (or `tiltflow.methods`, ..) that names its module. Nothing is imported before it is needed.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from tiltflow.errors import InputError, did_you_mean


def names(package: str) -> list[str]:
    """The names of the parts in `tiltflow.<package>`, in alphabetical order: its files, and the entry points of other packages.
    None of them is imported."""
    return sorted({*own_names(package), *entries(package)})


def own_names(package: str) -> list[str]:
    """The names of the parts that are files of `tiltflow.<package>`."""
    known = sys.modules.get(f"tiltflow.{package}")  # its path may have been extended with more folders
    path = [str(Path(__file__).parent.joinpath(*package.split(".")))] if known is None else known.__path__
    files = (module.name for module in pkgutil.iter_modules(path) if not module.ispkg)
    return [file.replace("_plus", "+").replace("_", "-") for file in files]


@cache
def entries(package: str) -> Mapping[str, EntryPoint]:
    """The parts that installed packages add, by name: entry points of the group `tiltflow.<package>`, each naming a module that
    is made like a file of that folder. A part of tiltflow's own takes precedence over one of the same name."""
    return {entry.name: entry for entry in entry_points(group=f"tiltflow.{package}")}


@cache
def find(package: str, name: str) -> type[Any]:
    """Return the class of a part by name. Raises InputError, with the nearest name, if there is none."""
    if name not in (known := names(package)):
        kind = package.rpartition(".")[2].replace("ies", "ys").removesuffix("s")
        raise InputError(f"there is no {kind} {name!r}{did_you_mean(name, known)}")
    part: type[Any] = member(package, name, "".join(word.capitalize() for word in _file(name).split("_")))
    return part


def member(package: str, name: str, what: str) -> Any:
    """Return `what` from the module of a part. Raises InputError if the part is another package's and its module lacks it."""
    module = module_of(package, name)
    if not hasattr(module, what):
        raise InputError(f"entry point tiltflow.{package} {name!r}: {module.__name__} has no {what!r}")
    return getattr(module, what)


def module_of(package: str, name: str) -> ModuleType:
    """Import the module of a part by name. Raises InputError if it is another package's and cannot be imported."""
    if name in own_names(package) or name not in entries(package):
        return importlib.import_module(f"tiltflow.{package}.{_file(name)}")
    entry = entries(package)[name]
    try:
        module = entry.load()
    except Exception as error:  # whatever the other package's code does while it is imported
        raise InputError(f"entry point tiltflow.{package} {name!r}: {entry.value} cannot be imported ({error})") from error
    if not isinstance(module, ModuleType):
        raise InputError(f"entry point tiltflow.{package} {name!r}: {entry.value} must be a module")
    return module


def _file(name: str) -> str:
    """
    >>> _file("dpm-solver++")
    'dpm_solver_plus_plus'
    """
    return name.replace("+", "_plus").replace("-", "_")


def part_of(package: str) -> Callable[[Any], Any]:
    """A pydantic validator: a name, or a mapping with a `name`, becomes the settings of that part."""

    def build(value: Any) -> Any:
        from pydantic import ValidationError
        from pydantic_core import PydanticCustomError

        from tiltflow.settings import Settings, first_problem

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


@contextmanager
def allow_code() -> Iterator[None]:
    """Allow, in this context, code that comes with a run or a model folder. Otherwise it is refused: to look at a run that
    somebody else made does not execute code that came with it.

    >>> with allow_code():
    ...     pass
    """
    token = _CODE_OF_RUNS.set(True)
    try:
        yield
    finally:
        _CODE_OF_RUNS.reset(token)


_CODE_OF_RUNS: ContextVar[bool] = ContextVar("code of runs", default=False)


def code_allowed() -> bool:
    """True inside `allow_code`."""
    return _CODE_OF_RUNS.get()


def run_around(path: Path) -> Path | None:
    """Folder of the run that is or contains `path`; None if there is none."""
    for folder in (path, *path.parents):
        if (folder / "recipe.yaml").exists() and any((folder / name).exists() for name in PARTS_OF_RUNS):
            return folder
    return None


PARTS_OF_RUNS = ("metrics.jsonl", "checkpoints", "summary.json", "report.html")


def import_function(path: str, what: str) -> Callable[..., Any]:
    """Import the user's function `package.module:function` from the Python path or the current directory.

    Raises InputError, which calls it `what`, if the module, the function or something they import is missing, or if it is in
    the folder of a run (see `allow_code`).
    """
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise InputError(f"{what}: must read package.module:function, got {path!r}")
    module = import_module(module_name, f"{what} {path}")
    if not hasattr(module, name):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{what} {path}: {module_name} has no {name!r}{did_you_mean(name, known)}")
    function = getattr(module, name)
    if not callable(function):
        raise InputError(f"{what} {path}: {name!r} must be a function, is {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def import_module(name: str, what: str) -> ModuleType:
    """Import a module. The current directory is searched last, so that nothing in it hides an installed package, and not at all
    if it belongs to a run."""
    here = os.getcwd()
    if here not in sys.path and (code_allowed() or run_around(Path(here)) is None):
        sys.path.append(here)  # permanently: the function may import its neighbours when it is called
    importlib.invalidate_caches()
    parts = name.split(".")
    try:
        for i in range(1, len(parts) + 1):  # a package is looked at before its own code runs
            part = ".".join(parts[:i])
            if part not in sys.modules:
                _refuse_code_of_runs(find_spec(part) or (PathFinder.find_spec(part, [here]) if i == 1 else None), what)
            importlib.import_module(part)
        return sys.modules[name]
    except InputError:
        raise
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"there is no module {error.name!r} on the Python path or in {here}") from None
        raise InputError(f"module {name!r} cannot be imported ({error})") from error
    except Exception as error:  # whatever the user's code does while it is imported
        raise InputError(f"module {name!r} cannot be imported ({type(error).__name__}: {error})") from error


def _refuse_code_of_runs(spec: ModuleSpec | None, what: str) -> None:
    """Raises InputError if the code is in a run, by its path or by the target of a link, and `allow_code` is not active."""
    if spec is None or code_allowed():
        return
    for place in map(
        Path, [*(spec.submodule_search_locations or ()), *([spec.origin] if spec.has_location and spec.origin else [])]
    ):
        for path in (place.absolute(), place.resolve()):
            if (run := run_around(path)) is not None:
                raise InputError(
                    f"{what} would run code that lies in the run {run} ({path}); if you trust it, add --allow-code,"
                    " or in Python with tiltflow.allow_code():"
                )
