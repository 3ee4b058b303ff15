"""Samples whose reward could not be computed and that got a value instead: their number, step by step of a training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from tiltflow import processes

MANY = 0.05
"""Share of samples above which a person is told that the law is in part that of the value for failures."""
ENOUGH = 8
"""Samples that have failed before training tells."""


class Failures:
    """Counts them while it is the context; nothing is counted where there is none."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.count = 0

    def __enter__(self) -> Failures:
        self._before = _FAILURES.get()
        _FAILURES.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _FAILURES.set(self._before)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing in this context is counted."""
        _FAILURES.set(None)
        try:
            yield
        finally:
            _FAILURES.set(self)

    def taken(self) -> dict[str, float]:
        """{"failed": how many in all processes since the last call}; empty if there are none."""
        count, self.count = processes.total(float(self.count), self.device), 0
        return {"failed": count} if count else {}


_FAILURES: ContextVar[Failures | None] = ContextVar("failures", default=None)


def count_failures(number: int) -> None:
    """So many more samples failed."""
    if (counted := _FAILURES.get()) is not None:
        counted.count += number
