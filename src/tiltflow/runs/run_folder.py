"""The folder of a run: created or resumed, and filled while the run trains.

recipe.yaml      the resolved recipe
fingerprints.json
                 of what the recipe names; see `tiltflow.runs.fingerprints`
metrics.jsonl    one line per optimizer step
checkpoints/     the states that training resumes from; see `tiltflow.runs.checkpoint`
monitor.jsonl    one line per look at the model during training; see `tiltflow.evaluation.monitor`
best/            the model at the best of these looks
diagnostics/     for each number that was not finite: its value and where it came from; the traceback of user code's exception
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

from torch import nn

from tiltflow import processes
from tiltflow.errors import InputError, Interrupted
from tiltflow.files import check_room, write_folder, write_json, write_rows
from tiltflow.optimization import refuse_non_finite
from tiltflow.runs import checkpoint
from tiltflow.runs.failures import diagnosed
from tiltflow.runs.fingerprints import FILE as FINGERPRINTS
from tiltflow.runs.fingerprints import absolute, compare, fingerprints, read_fingerprints
from tiltflow.runs.lock import working_in
from tiltflow.runs.looks import Watcher, write_first_looks
from tiltflow.runs.recipe import RunSettings
from tiltflow.runs.recorder import Recorder
from tiltflow.runs.resume import find_checkpoint, flat, read_state, refuse_changes
from tiltflow.runs.run_files import RECIPE, claim, inside, refuse_links, write_yaml
from tiltflow.runs.trackers import Tracker, check_tracker
from tiltflow.settings import Settings
from tiltflow.tensor_file import Tree
from tiltflow.training.callbacks import Callback
from tiltflow.training.records import METRICS, known_records
from tiltflow.training.settings import Training
from tiltflow.training.signals import noted
from tiltflow.training.trainer import BatchEnd, Record

ECHO = 5.0
"""Seconds in which a launcher of several processes may repeat a signal."""
R = TypeVar("R", bound=Settings)


class Loop(Protocol):
    """A training loop that is ready to begin; see `tiltflow.training.trainer.train`."""

    def __call__(
        self,
        *,
        resume_from: Tree | None,
        on_batch_end: Callable[[BatchEnd], None],
        stop: Callable[[], int | None],
    ) -> Generator[Record, None, None]: ...


@dataclass
class RunFolder(Generic[R]):
    """A run's folder and the checkpoint it resumes from.

    Args:
        recipe: a recipe, or the settings of a run that a program began, with absolute paths.
        state: the state of the training loop to resume from, if any.
        note: is told what the user should know.
        prints: the fingerprints in that checkpoint, if it has any.
        also: fingerprints of what the recipe does not name.
    """

    path: Path
    recipe: R
    state: Tree | None = None
    note: Callable[[str], None] = lambda text: None
    tracker: Tracker | None = None
    prints: Any = None
    also: Mapping[str, str] = field(default_factory=dict)
    known: dict[str, str] = field(default_factory=dict)
    """The current fingerprints, in the main process."""
    said: list[str] = field(default_factory=list)
    """Notes about fingerprints that have been given."""

    @classmethod
    @contextmanager
    def begin(
        cls,
        path: Path,
        recipe: R,
        note: Callable[[str], None] = lambda text: None,
        also: Mapping[str, str] | None = None,
    ) -> Iterator[RunFolder[R]]:
        """Begin a new run, or resume the one in the folder if the recipe says so: a context in which no other process works in
        the folder. A folder that is left empty is deleted.

        Args:
            also: fingerprints of what the recipe does not name.

        Raises InputError if the folder cannot be written to, is occupied or in use, or if the run in it is another one;
        CheckpointError if the checkpoint that was asked for is damaged.
        """
        folder = cls(path, absolute(recipe), note=note, also=also or {})
        if folder.training.report_to is not None:
            check_tracker(folder.training.report_to)
        with working_in(path, note):
            folder._open()
            yield folder

    @property
    def training(self) -> Training:
        """The training settings of the run."""
        return cast(RunSettings, self.recipe).training

    @property
    def start_step(self) -> int:
        """The step that the run resumes from; 0 for a new one."""
        return 0 if self.state is None else int(self.state["step"])

    def _open(self) -> None:
        """Check the folder, which is locked, and read the state to resume from, if the recipe asks for it."""
        wanted = self.training.resume_from_checkpoint
        if wanted is None or not (self.path / RECIPE).exists():
            claim(self.path)
            processes.wait()  # until all have looked, before one writes
            if wanted is not None:
                self.note("there is no run to resume yet: a new one begins")
            return
        refuse_links(self.path)
        processes.from_main(lambda: refuse_changes(self.path, self.recipe))
        chosen = find_checkpoint(self.path, wanted, self.note)
        if chosen is None:
            self.note("no checkpoint to resume from: the run starts over")
            return
        saved = read_state(chosen, self.note)
        self.state, self.prints = saved["loop"], saved.get("fingerprints")
        processes.from_main(self._compare)
        self.note(f"resuming from {chosen.name}")

    def _compare(self) -> None:
        """Compare what the recipe names with what it was. Raises InputError if it has changed and that is not accepted.

        Called before anything is loaded, and again before anything is written: the commit of a model on the hub is known only
        then."""
        self.known = {**fingerprints(self.recipe), **self.also}
        if self.state is not None:
            then = self.prints if isinstance(self.prints, dict) else read_fingerprints(self.path)
            for sentence in compare(self.path, then, self.known):
                if sentence not in self.said:
                    self.said.append(sentence)
                    self.note(sentence)

    def train(
        self,
        loop: Loop,
        save: Callable[[], None],
        *,
        callbacks: Sequence[Callback] = (),
        before: Callable[[], None] = lambda: None,
        watcher: Watcher | None = None,
        handle_signals: bool = False,
    ) -> None:
        """Run the loop; write recipe, metrics and checkpoints, and in the end, even after an error, `save` the tuned model.

        Args:
            callbacks: called with every record, in the main process; see `Callback`.
            before: called, in the main process, once the first step has shown that the recipe works: writes what the run
                needs beside its recipe.
            watcher: takes the monitor's looks, if the recipe has one.
            handle_signals: True lets signals (`tiltflow.training.signals`) ask the loop to stop; not possible in threads.

        Raises what the loop raises: NonFiniteError and UserCodeError, with diagnostics in diagnostics/, the latter with a
        checkpoint to resume from, as Interrupted.
        """
        recorder = Recorder(self.path, self.training, self.start_step, callbacks, self.note, watcher)
        echo = ECHO if processes.count() > 1 else 0.0
        with noted(recorder.announce_stop, echo=echo) if handle_signals else nullcontext(lambda: None) as stop:
            records = loop(resume_from=self.state, on_batch_end=recorder.on_batch_end, stop=stop)
            with closing(records), diagnosed(self.path, self.recipe, self.training, self.note):
                first = list(islice(records, 1))  # what does not fit shows in the first step, before anything is written
                processes.by_main(lambda: self._write_beginning(watcher, before))
                recorder.tracker, recorder.fingerprints = self.tracker, self.known
                recorder.record(first, records, save)
            if signal := max(processes.exchanged(stop() or 0)):
                raise Interrupted(f"training is complete; stopped by signal {signal} before the evaluation", signal)

    def _write_beginning(self, watcher: Watcher | None, before: Callable[[], None]) -> None:
        """Write the recipe first, so that a run that is killed here can be resumed, and then what else a run begins with."""
        new = not (self.path / RECIPE).exists()
        tree = self.recipe.model_dump(mode="json")
        tree["training"]["resume_from_checkpoint"] = None
        self._compare()
        write_yaml(self.path / RECIPE, tree)
        write_json(self.path / FINGERPRINTS, self.known)
        if self.training.report_to is not None:
            try:
                self.tracker = Tracker.start(self.training.report_to, self.path, flat(tree))
            except InputError:
                if new:
                    for path in inside(self.path):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                raise
        before()
        self._write_metrics()
        if watcher is not None:
            write_first_looks(self.path, watcher, self.start_step)
        for later in checkpoint.checkpoints(self.path / checkpoint.FOLDER):
            if checkpoint.step_of(later) > self.start_step:
                self.note(f"{later.name} is deleted: the run resumes from an earlier step")
                checkpoint.delete_checkpoint(later)

    def _write_metrics(self) -> None:
        """Write the lines of metrics up to the step that the run resumes from."""
        rows = [row for row in known_records(self.path)[0] if row["step"] <= self.start_step]
        if lost := sorted(set(range(1, self.start_step + 1)) - {row["step"] for row in rows}):
            steps = f"step {lost[0]}" if len(lost) == 1 else f"{len(lost)} steps, {lost[0]} to {lost[-1]},"
            self.note(f"{METRICS}: the metrics of {steps} are lost; the checkpoint is intact")
            if lost[-1] == self.start_step and self.state is not None:  # a report needs these numbers of the last line
                rows.append({key: self.state[key] for key in ("step", "seconds", "network_evaluations")})
        write_rows(self.path / METRICS, rows)

    def save(self, network: nn.Module, write: Callable[[Path], object], to: str = "model") -> None:
        """Let `write` fill the folder `to` of the run with what was tuned; it is then complete, or unchanged.

        Raises NonFiniteError if a number in the network is not finite, OutputError if the disk refuses it.
        """
        trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        refuse_non_finite(trained | dict(network.named_buffers()), "the tuned model")
        with processes.whole(network):
            processes.by_main(lambda: write_folder(self.path / to, write))

    def check_room(self, trained: int, *, model: int, copied: int = 0) -> None:
        """Raise InputError if the disk clearly has too little room for what the run will write.

        Args:
            trained: bytes of the trained parameters; a checkpoint has them and the state of their optimizer.
            model: bytes of the tuned model.
            copied: bytes of what else is copied into the folder.
        """
        saved = int(trained * (1 + (self.training.ema_decay > 0) + (0.5 if self.training.use_8bit_adam else 2)))
        processes.from_main(lambda: check_room(self.path, saved + model + copied, max(saved, model)))

    def end(self, summary: Mapping[str, Any]) -> None:
        """Report the summary of the run to the tracker, if there is one."""
        if self.tracker is not None:
            self.tracker.end(self.path, summary)
