"""Being asked to stop: the first SIGINT or SIGTERM is noted, for a loop to save and leave; a second one leaves at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ASKED = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def noted(told: Callable[[int], None] = lambda number: None, *, echo: float = 0.0) -> Iterator[Callable[[], int | None]]:
    """In this context, a function says which signal has asked to stop, if one has: 2 or 15.

    Args:
        told: is called with the first one, from within the handler, to say that it was heard.
        echo: for so many seconds after the first one, others are taken for the same: a launcher of several processes passes on
            what has reached them already.
    """
    received: list[int] = []
    first = 0.0

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if received and time.monotonic() - first < echo:
            return
        if received:
            os._exit(128 + number)  # whoever asks twice does not want to wait
        first = time.monotonic()
        received.append(number)
        told(number)

    before = {number: signal.signal(number, handler) for number in ASKED}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, old in before.items():
            signal.signal(number, old)
