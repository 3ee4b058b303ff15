"""Calls of user code, such as networks, rewards, solvers and features: its exceptions become errors of one line."""

from __future__ import annotations

import operator
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tiltflow.errors import InputError, NonFiniteError, OutOfMemoryError, TiltflowError, UserCodeError

OWN = str(Path(__file__).parent)
LIBRARIES = tuple({OWN, *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))})
"""Folders of code that is not the user's."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn any exception in this context into a UserCodeError of one line that begins with `what`.

    tiltflow's own errors and a lack of memory pass through.
    """
    try:
        yield
    except Exception as error:
        if passes_through(error):
            raise
        raise explanation(what, error) from error


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Turn whatever a library raises in this context, while it reads files or settings, into an InputError of one line that
    begins with `what`. No library lists what it raises for damaged or malicious input.

    tiltflow's own errors pass through; a lack of memory is an OutOfMemoryError.
    """
    try:
        yield
    except TiltflowError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        kind = "" if isinstance(error, (OSError, ValueError)) and lines[0] else f"{type(error).__name__}: "
        problem = OutOfMemoryError if out_of_memory(error) else InputError
        raise problem(f"{what} ({kind}{lines[0][:300]})") from error


def passes_through(error: Exception) -> bool:
    """True for tiltflow's own exceptions and for a lack of memory, which are no mistakes of user code."""
    return isinstance(error, TiltflowError) or out_of_memory(error)


def explanation(what: str, error: Exception, hint: str = "") -> UserCodeError:
    """Make the error of one line for an exception of user code; it begins with `what` and ends with the hint."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return UserCodeError(f"{what} raised {said}{place(error)}{hint}", "".join(traceback.format_exception(error)))


def place(error: Exception) -> str:
    """Place where an exception was raised, as ` (in function, line 3 of file.py)`: the innermost line of the user's own code,
    or else the outermost one of a library; empty if all of it is tiltflow's or torch's."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith((OWN, str(Path(torch.__file__).parent)))
    ]
    if not frames:
        return ""
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)]
    frame = own[-1] if own else frames[0]
    return f" (in {frame.name}, line {frame.lineno} of {frame.filename})"


def out_of_memory(error: Exception) -> bool:
    """True for a lack of memory, for which torch has no type on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def whole_number(value: Any, name: str, least: int = 0) -> int:
    """Convert `value` to an int. Raises InputError, with its name, if it is no integer or less than `least`.

    >>> whole_number(3, "seed")
    3
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        got = repr(value) if isinstance(value, (int, float, str)) else type(value).__name__
        raise InputError(f"{name} must be an integer >= {least}, is {got}")
    return number


def check_device(device: torch.device | str) -> None:
    """Raises InputError if torch has no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError):
        raise InputError(f"device {str(device)!r}: torch has no such device here; 'cpu' always works") from None


@contextmanager
def tried(where: str = "") -> Iterator[None]:
    """Turn an error of user code or a number that is not finite in this context, where user code is only tried, into an
    InputError. The message begins with `where`, if that is given."""
    try:
        yield
    except (UserCodeError, NonFiniteError, InputError) as error:
        if isinstance(error, InputError) and not where:
            raise
        raise InputError(f"{where}: {error}" if where else str(error)) from error
