"""Atomic writing of files and folders; what the operating system refuses is an error of one line.

A file is written under another name in the same folder and renamed. So is a folder; the old one is moved aside first, so for a
moment there is none: `repair` puts it back if the process ended just then. A draft is called `.NAME.tmp-1a2b3c4d`, what was
moved aside `.NAME.old-1a2b3c4d`.

Files in JSON Lines may have been damaged by a power cut, a full disk or a person: the lines that are intact are read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, MutableSequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tiltflow.errors import InputError, OutputError
from tiltflow.formatting import size

LITTER = re.compile(r"\.(.+)\.(tmp|old)-[0-9a-f]{8}")
PROBE = 4096  # bytes


def reason(error: BaseException) -> str:
    """Reason of an error in a few words: the operating system's, or the first line of the message."""
    return getattr(error, "strerror", None) or (str(error).strip() or repr(error)).splitlines()[0]


@contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Turn an error while `path` is written in this context into an OutputError of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has a type of its own for a full disk
        raise OutputError(f"{path}: cannot be written ({reason(error)})") from None


def flush(path: Path) -> None:
    """Flush a file or folder onto the disk (fsync): a rename may otherwise reach it before the content does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Let `write` fill a file of another name and rename it, so that `path` is complete or unchanged. Raises OutputError.

    Args:
        durable: flush it onto the disk first, so that it survives a power cut too.
    """
    draft = _beside(path, "tmp")
    with writing(path):
        try:
            write(draft)
            if durable:
                flush(draft)
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a text atomically. Raises OutputError."""
    write_file(path, lambda draft: draft.write_text(text, encoding="utf-8"), durable=durable)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically. Raises OutputError."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write a line of JSON for each row, atomically. Raises OutputError."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows), durable=True)


def append_row(path: Path, row: Any) -> None:
    """Append a line of JSON. Raises OutputError; the file may then end in half a line."""
    line = (json.dumps(row) + "\n").encode()
    with writing(path), open(path, "ab", buffering=0) as file:
        while line:
            line = line[file.write(line) :]


def read_rows(path: Path, check: Callable[[Any], object]) -> tuple[list[dict[str, Any]], int]:
    """Read the intact lines of a file in JSON Lines and count the damaged ones; there are none of both if there is no file. A
    last line without an end is not counted: it is being written.

    Each line has a `step` that is greater than that of the line before and at least the number of the line, counted from 0.

    Args:
        check: raises an exception for a damaged line.

    Raises InputError if the file cannot be read.
    """
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines):
        take_row(rows, line, number, check)
    return rows, len(lines) - len(rows)


def take_row(rows: MutableSequence[dict[str, Any]], line: bytes, number: int, check: Callable[[Any], object]) -> bool:
    """Add a line of a file of `read_rows` to the rows before it, unless it is damaged; returns whether it was added.

    Args:
        number: of the line.
    """
    try:
        row = json.loads(line.decode())
        if type(row["step"]) is not int or row["step"] < number:
            return False
        check(row)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return False
    while rows and rows[-1]["step"] >= row["step"]:
        rows.pop()  # its step was damaged: what comes later cannot be lower
    rows.append(row)
    return True


@contextmanager
def trusted(path: Path, remedy: str = "`tiltflow evaluate` writes it again") -> Iterator[None]:
    """Turn an error while the content of `path` is used in this context into an InputError: the file is damaged, or an earlier
    version wrote it; and `remedy` is what helps."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{path}: is damaged, or of an earlier version ({error!r}); {remedy}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON mapping in a file. Raises InputError if it cannot be read or is no mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: must be a mapping, got {type(content).__name__}")
    return content


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder of another name, flush it onto the disk and rename it in place of the old one, so that `path`
    is complete or unchanged. Raises OutputError."""
    draft, old = _beside(path, "tmp"), _beside(path, "old")
    with writing(path):
        try:
            draft.mkdir()
            write(draft)
            for inside in [*draft.rglob("*"), draft]:
                flush(inside)
            if path.exists():
                path.rename(old)
            draft.rename(path)
            flush(path.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            with suppress(OSError):
                if old.exists() and not path.exists():
                    old.rename(path)
            raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Yield a draft folder, whose content is moved into `folder` when the context ends without an error. Raises OutputError."""
    draft = _beside(folder / "content", "tmp")
    with writing(folder):
        try:
            draft.mkdir()
            yield draft
            for path in sorted(draft.iterdir()):
                path.rename(folder / path.name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}-{uuid.uuid4().hex[:8]}")


def repair(folder: Path) -> None:
    """Put back what a process that ended in the middle of `write_folder` has moved aside, and delete its drafts."""
    for path in list(folder.iterdir()):
        if match := LITTER.fullmatch(path.name):
            place = folder / match[1]
            if match[2] == "old" and not place.exists():
                path.rename(place)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def check_output(path: Path) -> None:
    """Make the folder of an output file and try to write into it, before the work is done.

    Raises InputError if that fails.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory")
        probe(path.parent, path.name)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"--output {path}: cannot be written ({reason(error)})") from None


def probe(folder: Path, name: str = "probe") -> None:
    """Write a small file into a folder, flush it onto the disk and delete it. Raises OSError if that fails."""
    draft = _beside(folder / name, "tmp")
    try:
        draft.write_bytes(bytes(PROBE))
        flush(draft)
    finally:
        draft.unlink(missing_ok=True)


def check_room(folder: Path, total: int, largest: int) -> None:
    """Raises InputError if a disk has clearly too little room for `total` bytes, or allows no file of `largest` bytes."""
    free = shutil.disk_usage(folder).free
    if free < total:
        raise InputError(f"{folder}: the disk has {size(free)} left, and the run needs at least {size(total)}")
    if (limit := _largest_file()) is not None and limit < largest:
        raise InputError(
            f"{folder}: no file may be larger than {size(limit)} (ulimit -f), and a checkpoint will have {size(largest)}"
        )


def _largest_file() -> int | None:
    """Largest size in bytes of a file of this process; None if it is not limited."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


PARTIAL = ".partial"
"""Suffix of the folder of a run in a sweep until the run is complete."""


def final_name(folder: Path) -> str:
    """The name that a folder has once it is complete.

    >>> final_name(Path("sweep/alpha=1.partial"))
    'alpha=1'
    """
    return folder.resolve().name.removesuffix(PARTIAL)
