"""A disk that fails, or a process that is killed, at any one of its operations."""

from __future__ import annotations

import builtins
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def at_each_operation(monkeypatch: pytest.MonkeyPatch, folder: Path, happen: Callable[[int], None]) -> Callable[[], int]:
    """Calls `happen(i)` before the i-th operation that changes something in `folder`; returns how many there were."""
    count, inside = 0, os.path.realpath(folder)

    def operation() -> None:
        nonlocal count
        count += 1
        happen(count - 1)

    def about(path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.realpath(path).startswith(inside)

    def wrapped(original: Any, path_at: int = 0) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            if about(arguments[path_at]):
                operation()
            return original(*arguments, **options)

        return call

    def opened(original: Any) -> Any:
        def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if about(file) and set(mode) & set("wax+"):
                operation()
            return original(file, mode, *arguments, **options)

        return call

    def flushed(original: Any) -> Any:
        def call(descriptor: int) -> None:
            if about(f"/proc/self/fd/{descriptor}"):
                operation()
            original(descriptor)

        return call

    def removed(original: Any) -> Any:
        def call(path: Any, ignore_errors: bool = False, **options: Any) -> None:
            try:
                if about(path):
                    operation()
            except OSError:
                if ignore_errors:
                    return
                raise
            original(path, ignore_errors=ignore_errors, **options)

        return call

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    monkeypatch.setattr(os, "fsync", flushed(os.fsync))
    monkeypatch.setattr(io, "open", opened(io.open))
    monkeypatch.setattr(builtins, "open", opened(builtins.open))
    monkeypatch.setattr(shutil, "rmtree", removed(shutil.rmtree))
    return lambda: count
