"""Time by phase: what drawing paths, adjoints, rewards and updates take, each measured where it is computed, for all methods.

The clock stops between the phases of a training loop that is its context, and nothing is measured where there is none:

    with Clock(device) as clock:
        with phase("rollout"):
            ..
    clock.taken()
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch

Phase = Literal["rollout", "adjoint", "reward", "update"]
"""rollout: drawing paths. adjoint: running it back along them. reward: rewards, with decoding and their gradient. update: the
gradient of a loss in the weights, and the optimizer's step; of a critic too."""
PHASES: tuple[Phase, ...] = get_args(Phase)

_CLOCK: ContextVar[Clock | None] = ContextVar("clock", default=None)
"""The clock that measures; another thread, such as that of a backward pass, has none."""


class Clock:
    """Seconds by phase, while it is the context. A phase inside another one is not counted in the outer one. On a GPU it waits,
    at the borders of phases, until what was begun before has ended."""

    def __init__(self, device: torch.device):
        self.device = device
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.open: list[Phase] = []
        """The phases that have begun and not ended, the innermost last."""
        self._since = 0.0

    def __enter__(self) -> Clock:
        self._before = _CLOCK.get()
        _CLOCK.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _CLOCK.set(self._before)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing in this context is measured."""
        _CLOCK.set(None)
        try:
            yield
        finally:
            _CLOCK.set(self)

    def taken(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken = {str(name): seconds for name, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(PHASES, 0.0)
        return taken

    def begin(self, name: Phase) -> None:
        """A phase begins."""
        self._charge()
        self.open.append(name)

    def end(self) -> None:
        """The innermost phase ends."""
        self._charge()
        self.open.pop()

    def _charge(self) -> None:
        """The time since the last border is that of the innermost phase."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.open:
            self._seconds[self.open[-1]] += now - self._since
        self._since = now


def current_phase() -> Phase | None:
    """The innermost phase of what is computed now, if a clock measures."""
    clock = _CLOCK.get()
    return clock.open[-1] if clock is not None and clock.open else None


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """What is computed in this context, or in a function that it decorates, is of a phase."""
    if (clock := _CLOCK.get()) is None:
        yield
        return
    clock.begin(name)
    try:
        yield
    finally:
        clock.end()
