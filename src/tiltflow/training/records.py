"""metrics.jsonl, one line for each optimizer step of a run; damaged lines are skipped and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltflow.files import read_rows
from tiltflow.timing import PHASES
from tiltflow.training.trainer import Record

METRICS = "metrics.jsonl"


def line_of(record: Record) -> dict[str, Any]:
    """The line of an optimizer step."""
    row: dict[str, Any] = {"step": record.step, "seconds": round(record.seconds, 3)}
    row |= {"network_evaluations": record.network_evaluations, "samples_drawn": record.samples_drawn}
    row |= {f"seconds_{name}": round(taken, 6) for name, taken in record.seconds_by_phase.items()}
    row |= {} if record.peak_memory is None else {"peak_memory_bytes": record.peak_memory}
    return row | record.metrics


def of_machine(key: str) -> bool:
    """True for a number of a line, or of the summary, that is another when a run is repeated: of time and memory."""
    return key.startswith("seconds") or key.endswith("_per_second") or key == "peak_memory_bytes"


def speed(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the summary says of the speed and the memory of a run, from its lines: the seconds of each phase and of all else,
    rates, and the peak.

    Rates are those after the first batch, which is slower, as kernels are chosen and networks compiled, and before which a
    calibration has evaluated networks; None if there was no second one.
    """
    last, total = records[-1], {name: sum(row.get(f"seconds_{name}", 0.0) for row in records) for name in PHASES}
    first = next(row for row in reversed(records) if row.get("samples_drawn") == records[0].get("samples_drawn"))
    seconds = last["seconds"] - first["seconds"]

    def rate(key: str) -> float | None:
        return (last[key] - first[key]) / seconds if seconds > 0 and key in last and key in first else None

    return {
        "seconds_by_phase": total | {"other": max(last["seconds"] - sum(total.values()), 0.0)} if any(total.values()) else None,
        "samples_per_second": rate("samples_drawn"),
        "network_evaluations_per_second": rate("network_evaluations"),
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in records if "peak_memory_bytes" in row), default=None),
    }


def failed_in_training(records: Sequence[Mapping[str, Any]]) -> int:
    """Samples of all steps whose reward could not be computed."""
    return int(sum(row.get("failed", 0) for row in records))


def known_records(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The intact lines of `metrics.jsonl`, and the number of damaged ones."""
    return read_rows(folder / METRICS, check_record)


def check_record(row: Any) -> None:
    """Raises an exception if `row` is no line of metrics.jsonl."""
    if not {"seconds", "network_evaluations"} <= row.keys():
        raise ValueError("no record")
    if not all(isinstance(key, str) and type(value) in (int, float) for key, value in row.items()):
        raise ValueError("no numbers")
