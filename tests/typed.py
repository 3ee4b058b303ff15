"""Commands as they are typed, in copies of this process (forks): a new one would import PyTorch and others first, which takes
longer than most of what commands do."""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Said:
    """What a command has come to."""

    returncode: int
    stdout: str
    stderr: str


def typed(*commands: Sequence[str], site: Path | None = None) -> list[Said]:
    """Run these commands one after the other in one process; see `apart`."""
    return apart(_each, commands, site=site)


def apart(function: Callable[..., T], *arguments: Any, site: Path | None = None) -> T:
    """What a function returns in a process that imports tiltflow anew, with the packages that are installed in `site`."""
    with quietly_forking(), ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(_anew, site, function, *arguments).result(timeout=200)


def _anew(site: Path | None, function: Callable[..., T], *arguments: Any) -> T:
    for name in [name for name in sys.modules if name.split(".")[0] == "tiltflow"]:
        del sys.modules[name]
    if site is not None:
        sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    warnings.resetwarnings()
    return function(*arguments)


def _each(commands: Sequence[Sequence[str]]) -> list[Said]:
    os.environ["COLUMNS"] = "300"
    said = []
    for words in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command(*words)
        said.append(Said(code, out.getvalue(), err.getvalue()))
    return said


def command(*words: str) -> int:
    """The exit code of `tiltflow` with these words, in this process."""
    from tiltflow.commands.terminal.app import main

    sys.argv = ["tiltflow", *words]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


class Beside(ForkProcess):
    """A function that runs beside the test, with signals, standard output and an exit code of its own: what it returns.

    Args:
        output: standard output and standard error are appended to it.
        folder: the current directory.
        first: called in the new process before all else.
    """

    def __init__(
        self,
        function: Callable[..., int | None],
        *arguments: Any,
        output: Path = Path(os.devnull),
        folder: Path = Path(),
        first: Callable[[], object] = lambda: None,
    ):
        super().__init__()
        self.function, self.arguments = function, arguments
        self.output, self.folder, self.first = output, folder, first
        with quietly_forking():
            self.start()

    def run(self) -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which has it ignored
        with open(self.output, "ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        self.first()
        os.chdir(self.folder)
        warnings.resetwarnings()
        with (
            open(1, "w", closefd=False) as sys.stdout,
            open(2, "w", closefd=False) as sys.stderr,
        ):  # not those that pytest reads
            sys.exit(self.function(*self.arguments))

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.join(timeout)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)


@contextlib.contextmanager
def quietly_forking() -> Iterator[None]:
    """Python warns of every fork of a process with threads; those of xdist only wait."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        yield
