"""metrics.jsonl, one line for each optimizer step of a run; damaged lines are skipped and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiltflow.files import read_rows

METRICS = "metrics.jsonl"


def known_records(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The intact lines of `metrics.jsonl`, and the number of damaged ones."""
    return read_rows(folder / METRICS, _check_record)


def _check_record(row: Any) -> None:
    """Raises an exception if `row` is no line of metrics.jsonl."""
    if not {"seconds", "network_evaluations"} <= row.keys():
        raise ValueError("no record")
    if not all(isinstance(key, str) and type(value) in (int, float) for key, value in row.items()):
        raise ValueError("no numbers")
