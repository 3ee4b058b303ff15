"""Processes that compute for molecules in parallel: quantum chemistry and force fields, which hold Python's lock or may crash.

They are programs of their own rather than forks, so that they do not import the user's script again, share no threads with
torch, and print nothing. A crash of one costs what it was computing. Questions and answers are lines of JSON.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tiltflow.chemistry.messages import read, written

T = TypeVar("T")
R = TypeVar("R")
PROGRAM = "from tiltflow.chemistry.workers import serve; serve()"
ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}


class Crashed:
    """What `Workers.map` yields for an item whose process ended while it was computed."""


class Workers:
    """Processes that are started when first used, and end with this object or with the process that has it.

    Args:
        count: of processes; None for one to a core.
    """

    def __init__(self, count: int | None = None):
        self.count = count or os.cpu_count() or 1
        self.idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for _ in range(self.count):
            self.idle.put(_Process())
        self.threads = ThreadPoolExecutor(self.count, thread_name_prefix="molecules")
        weakref.finalize(self, _end, self.idle, self.threads)

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R | Crashed]:
        """function(item) of each, in their order. An exception of the function is raised here as a RuntimeError.

        Args:
            function: of a module, so that it can be named to another process; of and to what `messages.py` can write.
        """
        jobs = [self.threads.submit(self._one, function, item) for item in items]
        try:
            for job in jobs:
                yield job.result()
        finally:
            for job in jobs:
                job.cancel()

    def _one(self, function: Callable[[T], R], item: T) -> R | Crashed:
        question, line = written((function.__module__, function.__qualname__, item)), b""
        process = self.idle.get()
        try:
            with contextlib.suppress(OSError):
                line = process.ask(question)
        finally:
            if not line.endswith(b"\n"):
                process.end()
            self.idle.put(process)
        if not line.endswith(b"\n"):
            return Crashed()
        answer, error = read(line)
        if error:
            raise RuntimeError(error)
        return answer  # type: ignore[no-any-return]


class _Process:
    """One of them; it is started by the first question, and again after it ended."""

    def __init__(self) -> None:
        self.running: subprocess.Popen[bytes] | None = None

    def ask(self, question: bytes) -> bytes:
        """The line that answers a line; not a whole one if the process ended."""
        if self.running is None:
            self.running = _started()
        assert self.running.stdin is not None
        assert self.running.stdout is not None
        self.running.stdin.write(question)
        self.running.stdin.flush()
        return self.running.stdout.readline()

    def end(self) -> None:
        if self.running is not None:
            self.running.kill()
            with contextlib.suppress(OSError):  # what it has not read yet
                self.running.communicate()
            self.running = None


def _started() -> subprocess.Popen[bytes]:
    """A process that finds this package where we did, and that Ctrl-C in our terminal does not reach."""
    places = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, places))},
        start_new_session=True,
    )


def _end(idle: queue.SimpleQueue[_Process], threads: ThreadPoolExecutor) -> None:
    threads.shutdown(wait=True, cancel_futures=True)
    while not idle.empty():
        idle.get().end()


def serve() -> None:
    """Answer questions on standard input until it ends. What libraries print goes nowhere."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        module, name, item = read(line)
        try:
            answer = written((getattr(importlib.import_module(module), name)(item), ""))
        except Exception:
            answer = written((None, traceback.format_exc()))
        answers.write(answer)
        answers.flush()
