"""Callbacks: functions that see every record of a training, and can end it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tiltflow.training.trainer import Record

Callback = Callable[[Record], object]
"""Called with the record of every optimizer step. If it returns True, training ends after the batch: as it would at the last
step, with a checkpoint, and with the evaluation of a run."""


def asks_to_stop(callbacks: Sequence[Callback], record: Record) -> bool:
    """Call every one of the callbacks; whether one of them returned True."""
    answers = [callback(record) for callback in callbacks]
    return any(answer is True for answer in answers)
