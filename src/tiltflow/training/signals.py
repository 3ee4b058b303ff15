"""Signals that ask to stop: the first one is noted, so that a loop can save and leave; a second one quits at once.

SIGINT is Ctrl-C; schedulers and launchers send SIGTERM, a closed terminal SIGHUP; Slurm is often told to send SIGUSR1
before the time limit (`--signal=USR1@300`).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ASKED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""The last two do not exist on Windows."""
HANGUP = getattr(signal, "SIGHUP", None)


@contextmanager
def noted(told: Callable[[int], None] = lambda number: None, *, echo: float = 0.0) -> Iterator[Callable[[], int | None]]:
    """A context that gives a function: the number of the signal that has asked to stop, such as 2 or 15, or None.

    A signal that is ignored when the context begins stays ignored: `nohup` does that to SIGHUP.

    Args:
        told: called with the first signal, from within the handler, to say that it was heard.
        echo: seconds after the first signal in which others count as the same one: a launcher of several processes passes on
            signals that have reached them already.
    """
    received: list[int] = []
    first = 0.0
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if received and time.monotonic() - first < echo:
            return
        if received:
            os._exit(128 + number)  # a second signal: quit at once
        first = time.monotonic()
        received.append(number)
        if number == HANGUP:
            _silence(terminals)
        told(number)

    before = {number: signal.signal(number, handler) for number in ASKED if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _silence(terminals: list[int]) -> None:
    """Send output to nowhere: writing to a closed terminal fails, and would end the run before it has saved."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for fd in terminals:
            os.dup2(nowhere, fd)
        os.close(nowhere)
