"""What the user wrote: networks, rewards, solvers, features. It gets copies, and what it raises is told in one line."""

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
"""Folders whose code the user did not write."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """In this context any exception becomes a UserCodeError of one line that begins with `what`.

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
    """In this context a library reads what it was given: whatever it raises is an InputError of one line that begins with
    `what`, since none has a list of what it raises for files and settings that are damaged, or were made to do damage.

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
    """Whether an exception is not of user code: one of tiltflow's own, or a lack of memory."""
    return isinstance(error, TiltflowError) or out_of_memory(error)


def explanation(what: str, error: Exception, hint: str = "") -> UserCodeError:
    """The error that tells what user code has raised in one line that begins with `what` and ends with the hint."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return UserCodeError(f"{what} raised {said}{place(error)}{hint}", "".join(traceback.format_exception(error)))


def place(error: Exception) -> str:
    """` (in function, line 3 of file.py)`: the innermost line that the user wrote, or else that of the library he uses; nothing
    if it was raised in tiltflow or in torch."""
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
    """Whether that is what went wrong; on the CPU torch has no type for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def whole_number(value: Any, name: str, least: int = 0) -> int:
    """`value` as an int. Raises InputError, naming it, for anything that is no whole number, or one below `least`.

    >>> whole_number(3, "seed")
    3
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        got = repr(value) if isinstance(value, (int, float, str)) else type(value).__name__
        raise InputError(f"{name} must be a whole number from {least} on, is {got}")
    return number


def check_device(device: torch.device | str) -> None:
    """Raises InputError if torch has no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError):
        raise InputError(f"device {str(device)!r}: torch has no such device here; 'cpu' always works") from None


@contextmanager
def tried(where: str = "") -> Iterator[None]:
    """In this context user code runs to see whether it works at all: what it raises, or a number that is not finite, is wrong
    input. The message begins with `where`, if anything."""
    try:
        yield
    except (UserCodeError, NonFiniteError, InputError) as error:
        if isinstance(error, InputError) and not where:
            raise
        raise InputError(f"{where}: {error}" if where else str(error)) from error
