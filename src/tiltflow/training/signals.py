"""Being asked to stop: the first signal is noted, for a loop to save and leave; a second one leaves at once.

SIGINT is Ctrl-C, SIGTERM what schedulers and launchers send, SIGHUP a terminal that was closed, and SIGUSR1 what Slurm is often
told to send before the time limit (`--signal=USR1@300`).
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
    """In this context, a function says which signal has asked to stop, if one has: 2 or 15, for example.

    A signal that is ignored when the context begins stays ignored, as `nohup` wants it for SIGHUP.

    Args:
        told: is called with the first one, from within the handler, to say that it was heard.
        echo: for so many seconds after the first one, others are taken for the same: a launcher of several processes passes on
            what has reached them already.
    """
    received: list[int] = []
    first = 0.0
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if received and time.monotonic() - first < echo:
            return
        if received:
            os._exit(128 + number)  # whoever asks twice does not want to wait
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
    """Writing to a terminal that is gone fails, and would end the run before it has saved: write nowhere instead."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for fd in terminals:
            os.dup2(nowhere, fd)
        os.close(nowhere)
