"""The steps of a run that is being trained, read as they are written: a page that grows asks every two seconds."""

# Mutation tests: test_view.py

from __future__ import annotations

import os
from collections import deque
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from tiltflow.files import take_row
from tiltflow.formatting import number
from tiltflow.training.records import METRICS, check_record

RECENT = 2000
"""Steps that are kept, of each run."""
MARK = 64
"""Last bytes of what was read, by which a file is known to have only grown."""


class Growing:
    """The file metrics.jsonl of a run: what was read of it is not read again. Threads wait for one another."""

    def __init__(self, folder: Path) -> None:
        self.path, self.lock = folder / METRICS, Lock()
        self._begin(0)

    def _begin(self, inode: int) -> None:
        self.inode, self.end, self.mark, self.lines = inode, 0, b"", 0
        self.rows, self.first = deque[dict[str, Any]](), 0
        """Steps that are kept, and the one before them."""
        self.keys = set[str]()

    def after(self, step: int) -> tuple[list[dict[str, Any]], set[str]] | None:
        """(the steps after this one, the keys of all numbers that were not always zero); None where they are not kept, or there
        is no such step."""
        with self.lock:
            self._read()
            if not self.rows or not self.first <= step <= self.rows[-1]["step"]:
                return None
            return [row for row in self.rows if row["step"] > step], set(self.keys)

    def _read(self) -> None:
        """Read what is new; all of it if the file is another one, as that of a run that was resumed."""
        if not self.path.exists():
            self._begin(0)
            return
        with self.path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            file.seek(self.end - len(self.mark))
            if inode != self.inode or file.read(len(self.mark)) != self.mark:
                self._begin(inode)
                file.seek(0)
            whole, _, _ = file.read().rpartition(b"\n")
        if whole:
            self.end, self.mark = self.end + len(whole) + 1, (self.mark + whole + b"\n")[-MARK:]
            for line in whole.split(b"\n"):
                self._take(line)

    def _take(self, line: bytes) -> None:
        if take_row(self.rows, line, self.lines, check_record):
            self.keys |= {key for key in self.rows[-1] if number(self.rows[-1], key)}
        self.lines += 1
        if len(self.rows) > RECENT:
            self.first = self.rows.popleft()["step"]


@lru_cache(maxsize=64)
def growing(folder: Path) -> Growing:
    """The steps of a run; the same object each time."""
    return Growing(folder)
