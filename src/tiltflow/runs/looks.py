"""The monitor's looks at the model during training, and their lines in monitor.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltflow import processes
from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.monitor import LOOKS, Look, find_alarm, from_row, named, read_looks, to_row
from tiltflow.files import append_row, write_rows
from tiltflow.runs.trackers import Tracker


@dataclass(frozen=True)
class Watcher:
    """Functions with which a monitor looks at a model.

    Args:
        first: the look at the base.
        look: takes a look at the model as it is, after so many steps.
        save_best: saves the model, as the best so far.
        best_by: the measure by which looks are compared.
        target: each measure under the target law, where it can be estimated.
    """

    first: Look
    look: Callable[[int], Look]
    save_best: Callable[[], None]
    best_by: str
    target: Mapping[str, Estimate] | None = None


def take_look(
    folder: Path, watcher: Watcher, step: int, note: Callable[[str], None], tracker: Tracker | None = None
) -> str | None:
    """Take a look, write its line, and save the model if it is the best so far. Returns the alarm, if there is one.

    Args:
        note: is told of the first alarm of a run.
    """
    rows, look = read_looks(folder), watcher.look(step)
    looks = [*map(from_row, rows), look]
    alarm = find_alarm(looks, watcher.target)
    if alarm is not None and not any(row["alarm"] for row in rows):
        note(f"ALARM, {alarm}")
    best = all(look.held_out[watcher.best_by].value > other.held_out[watcher.best_by].value for other in looks[1:-1])
    if best:
        watcher.save_best()

    def write() -> None:
        row = to_row(look, alarm, best=best, best_by=watcher.best_by)
        append_row(folder / LOOKS, row)
        if tracker is not None:
            tracker.scalars({key: value[0] for key, value in row["measures"].items()}, step, "monitor/")

    processes.by_main(write)
    return alarm


def write_first_looks(folder: Path, watcher: Watcher, start_step: int) -> None:
    """Write the looks up to the step at which training begins or resumes, the one at the base first."""
    looks = [row for row in read_looks(folder) if row["step"] <= start_step] if start_step else []
    if not looks or looks[0]["step"] > 0:
        looks.insert(0, to_row(watcher.first, None, target=named(watcher.target)))
    write_rows(folder / LOOKS, looks)


def of_monitor(folder: Path) -> dict[str, Any]:
    """The result of a run's monitor, for its summary: the first alarm, and the step of the best model."""
    rows = read_looks(folder)
    if not rows:
        return {}
    best = [row["step"] for row in rows if row.get("best")]
    alarm = next((row for row in rows if row["alarm"]), None)
    return {
        "alarm": None if alarm is None else alarm["alarm"],
        "alarm_step": None if alarm is None else alarm["step"],
        "best_step": best[-1] if best else None,
        "best_by": rows[-1].get("best_by"),
    }
