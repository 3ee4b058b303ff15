"""Errors that a user can cause. The command line prints their message as one line; nothing else is shown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

SECRET = r"[\w.-]*(?:key|token|secret|pass|auth|credential|sig)[\w.-]*"
"""Names of URL parameters whose values are secret."""
KEY = re.compile(rf"([?&;]{SECRET}=)(?!\$\{{)[^&#\s'\"]+", re.IGNORECASE)
LOGIN = re.compile(r"(?<=://)(?![^/?#\s@]*\$\{)(?:[^/?#\s@:]*:[^\s]*|[^/?#\s]*)(?=@)")


class TiltflowError(Exception):
    """Base of every error that tiltflow raises on purpose. Its message says what is wrong, where, and what would be right."""


class InputError(TiltflowError):
    """The user's input is wrong: a recipe, a name, a file, a reward of the wrong shape. Exit code 2."""


class SettingsError(InputError, ValueError):
    """Settings that were made in Python are wrong. It is a ValueError too, which pydantic reports as a wrong value where they
    are part of other settings."""


class CheckpointError(TiltflowError):
    """A checkpoint cannot be written, or is not what was written. Exit code 1."""


class OutputError(TiltflowError):
    """A file cannot be written: the disk is full, for example. Exit code 1."""


class OutOfMemoryError(TiltflowError):
    """The device has too little memory for the recipe. Exit code 1."""


class Interrupted(TiltflowError):
    """Training was asked to stop, and its state is saved. Exit code 128 + the number of the signal."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


class UserCodeError(TiltflowError):
    """A function of the user raised an exception: one line that says what, and in which function, line and file. Exit code 1;
    what is tried before the first step raises InputError instead.

    Args:
        traceback: the full traceback, as Python prints it.
    """

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback


class NonFiniteError(TiltflowError):
    """A number that must be finite is not: training stops before the weights are touched. Exit code 1.

    Args:
        where: names of parameters, number of the step and samples, as far as they are known.
        tensors: some of the tensors from which it was computed, for diagnosis.
    """

    def __init__(self, message: str, where: dict[str, Any] | None = None, tensors: Mapping[str, Any] | None = None):
        super().__init__(message)
        self.where, self.tensors = dict(where or {}), dict(tensors or {})


class CollapseError(TiltflowError):
    """Nearly all weight is on so few samples that nothing can be learned: training stops before the network changes. Exit
    code 1."""


def visible(text: str) -> str:
    """`text` on one line, with the characters escaped that a terminal would obey: control characters and marks of direction.

    >>> visible("red\\x1b[31m\\n\\u202e")
    'red\\\\x1b[31m\\\\n\\\\u202e'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class Note(UserWarning):
    """Warning that tiltflow does something else than may have been meant. The command line prints it as one line."""


def redacted(text: str) -> str:
    """`text` without the passwords and keys of the URLs in it; names of variables stay.

    >>> redacted("http://me:pw@host/?api_key=1&n=2 and https://host/?key=${KEY}")
    'http://***@host/?api_key=***&n=2 and https://host/?key=${KEY}'
    """
    return LOGIN.sub("***", KEY.sub(r"\1***", text))


def did_you_mean(wrong: str, allowed: Iterable[str]) -> str:
    """`", did you mean 'right'?"` for the nearest allowed name, the list of names if none is near.

    >>> did_you_mean("mixtur", ["gaussian", "mixture"])
    ", did you mean 'mixture'?"
    >>> did_you_mean("x", ["gaussian", "mixture"])
    '; known: gaussian, mixture'
    """
    names = sorted(allowed)
    near = difflib.get_close_matches(wrong, names, n=1)
    if near:
        return f", did you mean {near[0]!r}?"
    listed = ", ".join(names[:40] + [".."] * (len(names) > 40))
    return f"; known: {listed}" if names else ""


def not_installed(package: str, extra: str) -> InputError:
    """Make the error for a package that is missing and that an extra of pyproject.toml installs.

    >>> print(not_installed("peft", "adapters"))
    peft is not installed: pip install '.[adapters]' in tiltflow's source folder
    """
    return InputError(f"{package} is not installed: pip install '.[{extra}]' in tiltflow's source folder")
