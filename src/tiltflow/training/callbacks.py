"""Callbacks: functions that see every record of a training run, and can end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tiltflow.training.trainer import Record

Callback = Callable[[Record], object]
"""Called with the record of every optimizer step. If it returns True, training ends after the batch as it would at the last
step: with a checkpoint and, in a run, the evaluation."""


def asks_to_stop(callbacks: Sequence[Callback], record: Record) -> bool:
    """Call all callbacks. Returns True if one of them did."""
    answers = [callback(record) for callback in callbacks]
    return any(answer is True for answer in answers)
