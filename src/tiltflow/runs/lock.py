"""The lock of a folder: one process at a time writes into it, and the next one is told which.

The operating system's lock, by `filelock`, ends with the process that holds it, however that ends, on local disks and on NFS.
The file `.lock.json` beside it says who holds it, and is what is left where a process was killed: if it ran on this host, it is
gone, for the operating system gave its lock away, and the folder is taken over. If it ran on another one, that cannot be known,
as some network file systems keep locks for each host apart: a person has to say so.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tiltflow import processes
from tiltflow.errors import InputError, Note, OutputError
from tiltflow.files import probe, reason, repair, write_json

LOCK, HOLDER = ".lock", ".lock.json"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_held: set[tuple[Path, int]] = set()
"""The folders that this process works in, and in which of its threads."""


@dataclass(frozen=True)
class Holder:
    """A process that works in a folder.

    Args:
        started: when it did, in ticks since its host did: another process may get its number. None where that is not known.
        since: the time of day at which it began to work in the folder.
        job: the job of Slurm and how often it was requeued, if it is one.
    """

    process: int
    host: str
    command: str
    started: str | None
    since: str
    job: str | None
    restarts: int

    @classmethod
    def this(cls) -> Holder:
        """This process."""
        name = Path(sys.argv[0]).name
        command = f"tiltflow {sys.argv[1]}" if name in ("tiltflow", "__main__.py") and len(sys.argv) > 1 else name
        job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            process=os.getpid(),
            host=socket.gethostname(),
            command=command or "python",
            started=started_of(os.getpid()),
            since=time.strftime("%Y-%m-%d %H:%M"),
            job=job,
            restarts=int(restarts) if restarts.isdigit() else 0,
        )

    @classmethod
    def read(cls, path: Path) -> Holder | None:
        """The one that `path` names; None if there is no such file, or it is damaged."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def __str__(self) -> str:
        return f"{self.command} (process {self.process} on {self.host}, since {self.since})"

    def is_alive(self) -> bool:
        """Whether a process of this host, other than this one, is still the same. Asked where the operating system's lock was
        free, as it always is where the file system has none."""
        return self.process != os.getpid() and self.started is not None and started_of(self.process) == self.started

    def was_requeued_as(self, other: Holder) -> bool:
        """Whether the other one is the same job of Slurm, started again: then this one has ended."""
        return self.job is not None and self.job == other.job and self.restarts < other.restarts


def started_of(process: int) -> str | None:
    """When a process did, in ticks since the host did; None if there is none, or where there is no /proc."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _warn(text: str) -> None:
    warnings.warn(text, Note, stacklevel=2)


@contextmanager
def working_in(folder: Path, note: Callable[[str], None] = _warn) -> Iterator[None]:
    """Work in `folder` alone: it is made if there is none, and tried, and no other process may work in it until the context
    ends. If it is then empty, it is gone again. Of several processes on one run, the first one holds the lock. Inside another
    such context of the same folder and thread, this is nothing.

    Args:
        note: is told what a person should know; by default it is a warning.

    Raises InputError, in one line, if the folder cannot be made or written to, or if another process works in it.
    """
    with ExitStack() as stack:
        processes.from_main(lambda: stack.enter_context(_alone(folder, note)))
        yield


@contextmanager
def _alone(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """`working_in`, for one process."""
    try:
        key = (folder.resolve(), threading.get_ident())
        if key in _held:
            yield
            return
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a NUL in the name
        raise InputError(f"{folder}: cannot be made ({reason(error)})") from None
    lock = FileLock(folder / LOCK)
    try:
        _acquire(lock, folder, note)
        try:
            _held.add(key)
            yield
        finally:
            _held.discard(key)
            with suppress(OSError):
                (folder / HOLDER).unlink(missing_ok=True)
            _give_back(lock, folder)
    finally:
        with suppress(OSError):  # not empty: something is kept in it, or another process has come
            for path in made:
                path.rmdir()


def _acquire(lock: FileLock, folder: Path, note: Callable[[str], None]) -> None:
    path = folder / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = Holder.read(path) or "another process"
        raise InputError(f"{folder}: {who} is at work in it; wait until it ends, or give another folder") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"{folder}: cannot be written to ({reason(error)})") from None
        note(f"{folder}: its file system has no locks ({reason(error)}): two processes that begin at once may both go on")
    try:
        left, own = Holder.read(path), Holder.this()
        if left is not None and left.host == own.host and left.is_alive():
            raise InputError(f"{folder}: {left} is at work in it; wait until it ends, or give another folder")
        if left is not None and left.host != own.host and not left.was_requeued_as(own):
            raise InputError(
                f"{folder}: {left} has left its lock, and whether it still runs cannot be seen from {own.host}; if it does not:"
                f" rm {shlex.quote(str(path))}"
            )
        if left is not None:
            note(f"{left} has ended without giving its lock back: it is taken over")
        repair(folder)
        probe(folder)
        write_json(path, asdict(own))
    except (OSError, OutputError) as error:
        _give_back(lock, folder)
        raise InputError(f"{folder}: cannot be written to ({reason(error)})") from None
    except BaseException:
        _give_back(lock, folder)
        raise


def _give_back(lock: FileLock, folder: Path) -> None:
    with suppress(OSError):
        (folder / LOCK).unlink(missing_ok=True)  # while it is held: who has opened it sees that it is no longer there
    lock.release()
