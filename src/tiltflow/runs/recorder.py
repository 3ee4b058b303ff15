"""Recording a run while it trains: a line of metrics for each step, checkpoints, and the monitor's looks."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from tiltflow import processes
from tiltflow.errors import CollapseError, Interrupted, NonFiniteError
from tiltflow.files import append_row, flush, writing
from tiltflow.optimization import refuse_non_finite
from tiltflow.runs import checkpoint
from tiltflow.runs.failures import without_hiding
from tiltflow.runs.looks import Watcher, take_look
from tiltflow.runs.resume import environment
from tiltflow.runs.trackers import Tracker
from tiltflow.training.callbacks import Callback, asks_to_stop
from tiltflow.training.records import METRICS, line_of
from tiltflow.training.settings import Training
from tiltflow.training.trainer import BatchEnd, Record


class _Enough(Exception):
    """A callback, or the monitor, ends the training here."""


@dataclass
class Recorder:
    """Writes what a training loop yields into the folder of a run.

    Args:
        start_step: the step at which training begins or resumes.
        callbacks: called with every record, in the main process.
        note: is told what the user should know.
        watcher: takes the monitor's looks, if the run has one.
        fingerprints: of what the recipe names, for checkpoints; in the main process.
    """

    path: Path
    training: Training
    start_step: int
    callbacks: Sequence[Callback]
    note: Callable[[str], None]
    watcher: Watcher | None = None
    tracker: Tracker | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    _saved_at: int = field(init=False)
    """The step of the last checkpoint."""
    _looked_at: int = field(init=False)
    """The step of the last look."""
    _asked: bool = False
    """True once a callback has asked to stop."""
    _unsaved: bool = False
    """True once there is a step that a stop would have to save."""

    def __post_init__(self) -> None:
        self._saved_at = self._looked_at = self.start_step

    def record(self, first: list[Record], records: Generator[Record, None, None], save: Callable[[], None]) -> None:
        """Write all records, and then, even after an error, `save` the tuned model.

        Args:
            first: the first record, if the loop has yielded one.
            records: the rest of the loop; it is closed.

        Raises what the loop raises. An error of `save` is raised only if there is no other.
        """
        agreed, failed = True, True
        try:
            self._write(chain(first, records))
            failed = False
        except _Enough:
            failed = False
            self.note(f"training ends here, as {'a callback' if self._asked else 'training.monitor.stop'} asks")
        except (Interrupted, NonFiniteError, CollapseError):
            raise
        except BaseException:
            agreed = processes.count() == 1  # an error of this process alone: the others do not take part in saving
            raise
        finally:
            records.close()  # leaves the moving average in the weights
            if agreed and (self.start_step or first):
                without_hiding(save, self.note) if failed else save()

    def _write(self, records: Iterable[Record]) -> None:
        """Append each record to `metrics.jsonl`, and show it to the callbacks and the tracker."""
        for record in records:
            if not processes.is_main():
                continue
            row = line_of(record)
            append_row(self.path / METRICS, row)
            self._unsaved = True
            self._asked = asks_to_stop(self.callbacks, record) or self._asked
            if self.tracker is not None:
                self.tracker.scalars(row, record.step)

    def on_batch_end(self, end: BatchEnd) -> None:
        """Take a look and write a checkpoint where they are due. Raises an exception of its own to end the training where a
        callback or an alarm asks for it."""
        alarmed = self._look(end)
        enough = any(processes.exchanged(self._asked or alarmed))
        due = self._due(end.step, self._saved_at, self.training.checkpointing_steps) or end.stopping or enough
        if due and end.step > self._saved_at:
            self._save_checkpoint(end)
        if enough:
            raise _Enough

    def _look(self, end: BatchEnd) -> bool:
        """Take a look where one is due. Returns True if the training is to end because of an alarm."""
        watcher, monitor = self.watcher, self.training.monitor
        if watcher is None or monitor is None or end.stopping or not self._due(end.step, self._looked_at, monitor.steps):
            return False
        self._looked_at = end.step
        with end.averaged():
            alarm = take_look(self.path, watcher, end.step, self.note, self.tracker)
        return alarm is not None and monitor.stop

    def _due(self, step: int, last: int, every: int) -> bool:
        """True where something is due: after every so many steps (0: never), and at the end."""
        return step > last and (step >= self.training.max_train_steps or (every > 0 and step // every > last // every))

    def _save_checkpoint(self, end: BatchEnd) -> None:
        processes.by_main(self._flush_metrics)
        saved = {"environment": environment(), "fingerprints": self.fingerprints, "loop": end.state()}
        refuse_non_finite(checkpoint.tensors_in(saved), "the checkpoint", end.step)
        limit = self.training.checkpoints_total_limit
        checkpoint.save_checkpoint(self.path / checkpoint.FOLDER, end.step, saved, total_limit=limit)
        self._saved_at = end.step

    def _flush_metrics(self) -> None:
        with writing(self.path / METRICS):
            flush(self.path / METRICS)

    def announce_stop(self, number: int) -> None:
        """Tell the user that a signal was received, and what happens now."""
        saves = "saving a checkpoint" if self._unsaved else "no step is done yet"
        self.note(f"Stopping: {saves}. Press Ctrl-C again to quit {'without saving' if self._unsaved else 'at once'}.")
