"""The number of samples that rewards are evaluated on, in a context: what a training costs beside its networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class CountRewards:
    """Counts them while it is the context, in this process; a gradient is part of its evaluation."""

    def __init__(self) -> None:
        self.total = 0

    def __enter__(self) -> CountRewards:
        self._before = _COUNT.get()
        _COUNT.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _COUNT.set(self._before)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing in this context is counted."""
        _COUNT.set(None)
        try:
            yield
        finally:
            _COUNT.set(self)


_COUNT: ContextVar[CountRewards | None] = ContextVar("reward evaluations", default=None)


def count_rewards(number: int) -> None:
    """A reward is evaluated on so many samples."""
    if (counted := _COUNT.get()) is not None:
        counted.total += number
