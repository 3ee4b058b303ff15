"""Being asked to stop: the first SIGINT or SIGTERM is noted, for a loop to save and leave; a second one leaves at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ASKED = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def noted(told: Callable[[int], None] = lambda number: None) -> Iterator[Callable[[], int | None]]:
    """In this context, a function says which signal has asked to stop, if one has: 2 or 15.

    Args:
        told: is called with the first one, from within the handler, to say that it was heard.
    """
    received: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)  # whoever asks twice does not want to wait
        received.append(number)
        told(number)

    before = {number: signal.signal(number, handler) for number in ASKED}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, old in before.items():
            signal.signal(number, old)
