"""The lock of a folder: one process at a time writes into it, and others are refused with the name of that process.

The operating system's lock, by `filelock`, is released when the process that holds it ends, for whatever reason, on local disks
and on NFS. The file `.lock.json` beside it names the holder, and is left behind if that is killed. A holder on this host has
ended if its lock is free, so the folder is taken over. Whether a holder on another host has ended is unknown, as some network
file systems keep the locks of each host apart: the user has to decide.
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
"""The folders that this process has locked, and the threads in which it has."""


@dataclass(frozen=True)
class Holder:
    """A process that holds the lock of a folder.

    Args:
        started: the start of the process, in ticks since the host booted: its number may be reused. None where it is unknown.
        since: the date and time at which it took the lock.
        job, restarts: its Slurm job, if it is one, and how often that was requeued.
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
        """Read the holder from a file; None if there is no file, or it is damaged."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def __str__(self) -> str:
        return f"{self.command} (process {self.process} on {self.host}, since {self.since})"

    def is_alive(self) -> bool:
        """True if this process of this host is still running, and is not our own. This matters where the file system has no
        locks, so that the operating system's is always free."""
        return self.process != os.getpid() and self.started is not None and started_of(self.process) == self.started

    def was_requeued_as(self, other: Holder) -> bool:
        """True if the other holder is the same Slurm job, started again: then this one has ended."""
        return self.job is not None and self.job == other.job and self.restarts < other.restarts


def started_of(process: int) -> str | None:
    """The start of a process, in ticks since the host booted; None if there is no such process, or no /proc."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _warn(text: str) -> None:
    warnings.warn(text, Note, stacklevel=2)


@contextmanager
def working_in(folder: Path, note: Callable[[str], None] = _warn) -> Iterator[None]:
    """Lock `folder` in this context. It is created if necessary, and tested by writing a file; if it is empty at the end, it is
    deleted. Of the processes of a distributed run, the main process holds the lock. Nested entry for the same folder in the
    same thread is a no-op.

    Args:
        note: is told what the user should know; by default it is a warning.

    Raises InputError, in one line, if the folder cannot be created or written to, or if another process has locked it.
    """
    with ExitStack() as stack:
        processes.from_main(lambda: stack.enter_context(_alone(folder, note)))
        yield


@contextmanager
def _alone(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """`working_in` for a single process."""
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
            _release(lock, folder)
    finally:
        with suppress(OSError):  # not empty: it has content, or another process has locked it
            for path in made:
                path.rmdir()


def _acquire(lock: FileLock, folder: Path, note: Callable[[str], None]) -> None:
    """Take the lock, and write the file that names its holder. Raises InputError if another process has it."""
    path = folder / HOLDER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = Holder.read(path) or "another process"
        raise InputError(f"{folder}: in use by {who}; wait until it ends, or choose another folder") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"{folder}: cannot be written to ({reason(error)})") from None
        note(f"{folder}: its file system has no locks ({reason(error)}): two processes that start at once may both get in")
    try:
        left, own = Holder.read(path), Holder.this()
        if left is not None and left.host == own.host and left.is_alive():
            raise InputError(f"{folder}: in use by {left}; wait until it ends, or choose another folder")
        if left is not None and left.host != own.host and not left.was_requeued_as(own):
            raise InputError(
                f"{folder}: locked by {left}, and {own.host} cannot tell whether that is still running; if it is not:"
                f" rm {shlex.quote(str(path))}"
            )
        if left is not None:
            note(f"{left} ended without releasing its lock: it is taken over")
        repair(folder)
        probe(folder)
        write_json(path, asdict(own))
    except (OSError, OutputError) as error:
        _release(lock, folder)
        raise InputError(f"{folder}: cannot be written to ({reason(error)})") from None
    except BaseException:
        _release(lock, folder)
        raise


def _release(lock: FileLock, folder: Path) -> None:
    with suppress(OSError):
        (folder / LOCK).unlink(missing_ok=True)  # while it is held, so that a process that has opened it sees that it is gone
    lock.release()
