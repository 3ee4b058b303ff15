"""The folder of a run: begun or gone on with, and what training leaves in it, however it ends.

recipe.yaml      the resolved recipe
fingerprints.json
                 of what the recipe names; see `tiltflow.runs.fingerprints`
metrics.jsonl    one line per optimizer step
checkpoints/     what training goes on from; see `tiltflow.runs.checkpoint`
monitor.jsonl    one line per look at the model while it trained; see `tiltflow.evaluation.monitor`
best/            the model at the best of these looks
diagnostics/     for each number that was not finite: what it was and what it came from; the traceback of what user code raised
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from tiltflow import processes
from tiltflow.errors import (
    CheckpointError,
    CollapseError,
    InputError,
    Interrupted,
    NonFiniteError,
    Note,
    OutOfMemoryError,
    TiltflowError,
    UserCodeError,
)
from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.monitor import LOOKS, Look, find_alarm, from_row, named, read_looks, to_row
from tiltflow.files import append_row, check_room, flush, write_folder, write_json, write_rows, write_text, writing
from tiltflow.optimization import refuse_non_finite
from tiltflow.runs import checkpoint
from tiltflow.runs.fingerprints import FILE as FINGERPRINTS
from tiltflow.runs.fingerprints import absolute, compare, dotted, externals, fingerprints, put, read_fingerprints
from tiltflow.runs.lock import HOLDER, LOCK, working_in
from tiltflow.runs.trackers import Tracker, check_tracker
from tiltflow.settings import dump_yaml, read_yaml, validate
from tiltflow.tensor_file import Tree, write_tensors
from tiltflow.training.callbacks import Callback, asks_to_stop
from tiltflow.training.optimizer import move_old_keys
from tiltflow.training.records import METRICS, known_records
from tiltflow.training.signals import noted
from tiltflow.training.trainer import BatchEnd, Record
from tiltflow.user_code import out_of_memory

Count = Annotated[int, Field(ge=1)]
ECHO = 5.0  # seconds
RECIPE, DIAGNOSTICS, TRACEBACK = "recipe.yaml", "diagnostics", "traceback.txt"

FREE_TO_CHANGE = (
    "description",
    "evaluation",
    "training.checkpointing_steps",
    "training.checkpoints_total_limit",
    "training.max_skipped_steps",
    "training.monitor",
    "training.report_to",
    "training.micro_batch_size",
    "training.resume_from_checkpoint",
)
"""What may differ from the recipe of a run that is gone on with: it does not change what is computed, or not before the end."""


class Loop(Protocol):
    """A training loop that is ready to begin; see `tiltflow.training.trainer.train`."""

    def __call__(
        self,
        *,
        resume_from: Tree | None,
        on_batch_end: Callable[[BatchEnd], None],
        stop: Callable[[], int | None],
    ) -> Generator[Record, None, None]: ...


@dataclass(frozen=True)
class Watcher:
    """How a monitor looks at a model.

    Args:
        first: the look at the base.
        look: at the model as it is, after so many steps.
        save_best: keep it, as the best so far.
        best_by: the measure that says which look is the best.
        target: each measure under the target law, if enough is known of it.
    """

    first: Look
    look: Callable[[int], Look]
    save_best: Callable[[], None]
    best_by: str
    target: Mapping[str, Estimate] | None = None


class _Enough(Exception):
    """The recipe wants training to end here."""


@dataclass
class RunFolder:
    """A run's folder and the checkpoint it resumes from.

    Args:
        recipe: with absolute paths.
        note: is told what a person should know.
    """

    path: Path
    recipe: Any
    state: Tree | None = None
    note: Callable[[str], None] = lambda text: None
    tracker: Tracker | None = None
    prints: Any = None
    """The fingerprints in the checkpoint that is gone on from, if it has any."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of what the recipe does not name."""
    known: dict[str, str] = field(default_factory=dict)
    """The fingerprints of now, in the first process."""
    said: list[str] = field(default_factory=list)
    """What was said of them."""

    @classmethod
    @contextmanager
    def begin(
        cls,
        path: Path,
        recipe: Any,
        note: Callable[[str], None] = lambda text: None,
        also: Mapping[str, str] | None = None,
    ) -> Iterator[RunFolder]:
        """A new run, or, if the recipe says so, the one that is there, as a context in which no other process works in the
        folder. What is left empty is gone after it.

        Args:
            also: fingerprints of what the recipe does not name.

        Raises InputError if the folder cannot be written to, is occupied or worked in, or if the run that is there is another
        one; CheckpointError if a checkpoint was asked for that is not as it was written.
        """
        if recipe.training.report_to is not None:
            check_tracker(recipe.training.report_to)
        recipe = absolute(recipe)
        with working_in(path, note):
            yield cls._found(path, recipe, note, also or {})

    @classmethod
    def _found(cls, path: Path, recipe: Any, note: Callable[[str], None], also: Mapping[str, str]) -> RunFolder:
        """What there is to go on from in a folder that is locked."""
        wanted = recipe.training.resume_from_checkpoint
        if wanted is None:
            claim(path)
            processes.wait()  # for all to have looked, before one writes
            return cls(path, recipe, note=note, also=also)
        if not (path / RECIPE).exists():
            claim(path)
            processes.wait()
            note("there is no run to go on with yet: a new one begins")
            return cls(path, recipe, note=note, also=also)
        refuse_links(path)
        processes.from_main(lambda: refuse_changes(path, recipe))
        root = path / checkpoint.FOLDER
        processes.by_main(lambda: checkpoint.remove_litter(root))
        chosen: Path | None
        if wanted == "latest":
            chosen, skipped = checkpoint.latest_checkpoint(root)
            for problem in skipped:
                note(f"skipped {problem}")
        else:
            chosen = root / Path(wanted).name
            if not chosen.is_dir():
                known = ", ".join(folder.name for folder in checkpoint.checkpoints(root)) or "none"
                raise InputError(f"training.resume_from_checkpoint: {path} has no checkpoint {wanted!r}; it has {known}")
        if chosen is None:
            note("no checkpoint to go on from: the run begins anew")
            return cls(path, recipe, note=note, also=also)
        saved = checkpoint.load_checkpoint(chosen)
        loop = saved.get("loop")
        if not isinstance(saved.get("environment"), dict) or not isinstance(loop, dict) or type(loop.get("step")) is not int:
            raise CheckpointError(f"{chosen}: is not the checkpoint of a training run")
        for key, now in environment().items():
            if (then := saved["environment"].get(key)) != now:
                note(f"{key} was {then}, now {now}: the same numbers up to rounding, but not bit for bit")
        place = cls(path, recipe, loop, note, prints=saved.get("fingerprints"), also=also)
        processes.from_main(place._compare)
        note(f"going on from {chosen.name}")
        return place

    def _remedy(self, error: Exception) -> str:
        """What to lower, where memory runs out: what changes the memory and not the result comes first."""
        training = self.recipe.training
        size = training.micro_batch_size or training.train_batch_size
        half = next((part for part in range(size // 2, 0, -1) if training.train_batch_size % part == 0), None)
        remedies = []
        if half is not None:
            remedies.append(f"training.micro_batch_size={half} (now {size}) gives the same result in less memory")
        if getattr(self.recipe.model, "gradient_checkpointing", True) is False:
            remedies.append("model.gradient_checkpointing=true too, in a third more time")
        remedies = remedies or ["a smaller model, or a device with more memory, is needed"]
        return f"out of memory ({str(error).strip().splitlines()[0][:120]}). {'; '.join(remedies)}"

    def _look(self, watcher: Watcher, step: int) -> str | None:
        """Take a look, write it down, keep the best; the alarm, if there is one."""
        rows, look = read_looks(self.path), watcher.look(step)
        looks = [*map(from_row, rows), look]
        alarm = find_alarm(looks, watcher.target)
        if alarm is not None and not any(row["alarm"] for row in rows):
            self.note(f"ALARM, {alarm}")
        best = all(look.held_out[watcher.best_by].value > other.held_out[watcher.best_by].value for other in looks[1:-1])
        if best:
            watcher.save_best()

        def write() -> None:
            row = to_row(look, alarm, best=best, best_by=watcher.best_by)
            append_row(self.path / LOOKS, row)
            if self.tracker is not None:
                self.tracker.scalars({key: value[0] for key, value in row["measures"].items()}, step, "monitor/")

        processes.by_main(write)
        return alarm

    def _write_beginning(self, begun_at: int, watcher: Watcher | None, before: Callable[[], None]) -> None:
        """The recipe, first of all, so that what is cut off here can be gone on with; and what is known of the steps before."""
        new = not (self.path / RECIPE).exists()
        tree = self.recipe.model_dump(mode="json")
        tree["training"]["resume_from_checkpoint"] = None
        self._compare()
        write_yaml(self.path / RECIPE, tree)
        write_json(self.path / FINGERPRINTS, self.known)
        if self.recipe.training.report_to is not None:
            try:
                self.tracker = Tracker.start(self.recipe.training.report_to, self.path, flat(tree))
            except InputError:
                if new:
                    for path in inside(self.path):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                raise
        before()
        self._write_rows(begun_at, watcher)
        for later in checkpoint.checkpoints(self.path / checkpoint.FOLDER):
            if checkpoint.step_of(later) > begun_at:
                self.note(f"{later.name} is deleted: the run goes on from before it")
                checkpoint.delete_checkpoint(later)

    def _write_rows(self, begun_at: int, watcher: Watcher | None) -> None:
        """What is known of the steps before: a row for each step, and the looks."""
        rows = [row for row in known_records(self.path)[0] if row["step"] <= begun_at]
        if lost := sorted(set(range(1, begun_at + 1)) - {row["step"] for row in rows}):
            steps = f"step {lost[0]}" if len(lost) == 1 else f"{len(lost)} steps, {lost[0]} to {lost[-1]},"
            self.note(f"{METRICS}: what was written of {steps} is lost; the checkpoint is good")
            if lost[-1] == begun_at and self.state is not None:  # what the last line says is what a report needs
                rows.append({key: self.state[key] for key in ("step", "seconds", "network_evaluations")})
        write_rows(self.path / METRICS, rows)
        if watcher is not None:
            looks = [row for row in read_looks(self.path) if row["step"] <= begun_at] if begun_at else []
            if not looks or looks[0]["step"] > 0:
                looks.insert(0, to_row(watcher.first, None, target=named(watcher.target)))
            write_rows(self.path / LOOKS, looks)

    def _compare(self) -> None:
        """What the recipe names, as it is now, with what it was. Raises InputError if it has changed and that is not accepted.

        Called before anything is loaded, and again before anything is written: what comes from the hub is known by then."""
        self.known = {**fingerprints(self.recipe), **self.also}
        if self.state is not None:
            then = self.prints if isinstance(self.prints, dict) else read_fingerprints(self.path)
            for sentence in compare(self.path, then, self.known):
                if sentence not in self.said:
                    self.said.append(sentence)
                    self.note(sentence)

    def save(self, network: nn.Module, write: Callable[[Path], object], to: str = "model") -> None:
        """Let `write` fill the folder `to` of the run with what was tuned: whole, or as it was.

        Raises NonFiniteError if the network is not one to keep, OutputError if the disk does not take it.
        """
        trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
        refuse_non_finite(trained | dict(network.named_buffers()), "the tuned model")
        with processes.whole(network):
            processes.by_main(lambda: write_folder(self.path / to, write))

    def _flush_metrics(self) -> None:
        with writing(self.path / METRICS):
            flush(self.path / METRICS)

    def _beside(self, write: Callable[[], None]) -> None:
        """Write what is of use where an error ends the run, but does not hide that error if it cannot be written."""
        try:
            write()
        except TiltflowError as error:
            self.note(str(error))

    def _keep_traceback(self, text: str) -> None:
        path = self.path / DIAGNOSTICS / TRACEBACK
        with writing(path):
            path.parent.mkdir(exist_ok=True)
        write_text(path, text)
        self.note(f"the traceback is in {path}")

    def check_room(self, trained: int, *, model: int, copied: int = 0) -> None:
        """Raises InputError if the disk has clearly too little room for what the run will write.

        Args:
            trained: bytes of the parameters that are trained; a checkpoint has them and the state of their optimizer.
            model: bytes of the tuned model.
            copied: bytes of what else is put into the folder.
        """
        training = self.recipe.training
        saved = int(trained * (1 + (training.ema_decay > 0) + (0.5 if training.use_8bit_adam else 2)))
        processes.from_main(lambda: check_room(self.path, saved + model + copied, max(saved, model)))

    def end(self, summary: Mapping[str, Any]) -> None:
        """Tell the tracker, if there is one, what the run came to."""
        if self.tracker is not None:
            self.tracker.end(self.path, summary)

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
        """Run the loop; write recipe, metrics and checkpoints, and whatever happens `save` the tuned model.

        Args:
            callbacks: shown every record, in the main process; see `Callback`.
            before: called, in the main process, when the first step has shown that the recipe works: writes what the run
                needs beside its recipe.
            watcher: how to look at the model while it trains, if the recipe has a monitor.
            handle_signals: whether signals (`tiltflow.training.signals`) ask the loop to stop while it runs; not for threads.

        Raises what the loop raises: NonFiniteError and UserCodeError, with what is known of them in diagnostics/, the latter
        with a checkpoint to go on from, as Interrupted.
        """

        unsaved = False

        def shown(record: Record) -> bool:
            nonlocal unsaved
            unsaved = True
            return asks_to_stop(callbacks, record)

        def heard(number: int) -> None:
            saves = "saving a checkpoint" if unsaved else "no step is done yet"
            self.note(f"Stopping: {saves}. Press Ctrl-C again to quit {'without saving' if unsaved else 'at once'}.")

        echo = ECHO if processes.count() > 1 else 0.0
        with noted(heard, echo=echo) if handle_signals else nullcontext(lambda: None) as stop:
            self._train(loop, save, shown, before, watcher, stop)
            if signal := max(processes.exchanged(stop() or 0)):
                raise Interrupted(f"training is complete; stopped by signal {signal} before the evaluation", signal)

    def _train(
        self,
        loop: Loop,
        save: Callable[[], None],
        shown: Callable[[Record], bool],
        before: Callable[[], None],
        watcher: Watcher | None,
        stop: Callable[[], int | None],
    ) -> None:
        begun_at = 0 if self.state is None else self.state["step"]
        written, seen, asked = begun_at, begun_at, False
        settings = self.recipe.training

        def on_batch_end(end: BatchEnd) -> None:
            nonlocal written, seen
            alarm = None
            if watcher is not None and not end.stopping and due(end.step, seen, settings.monitor.steps):
                seen = end.step
                with end.averaged():
                    alarm = self._look(watcher, end.step)
            enough = any(processes.exchanged(asked or (alarm is not None and settings.monitor.stop)))
            if (due(end.step, written, settings.checkpointing_steps) or end.stopping or enough) and end.step > written:
                processes.by_main(self._flush_metrics)
                saved = {"environment": environment(), "fingerprints": self.known, "loop": end.state()}
                refuse_non_finite(checkpoint.tensors_in(saved), "the checkpoint", end.step)
                limit = settings.checkpoints_total_limit
                checkpoint.save_checkpoint(self.path / checkpoint.FOLDER, end.step, saved, total_limit=limit)
                written = end.step
            if enough:
                raise _Enough

        def show(record: Record) -> None:
            nonlocal asked
            asked = shown(record) or asked

        def due(step: int, last: int, every: int) -> bool:
            return step > last and (step >= settings.max_train_steps or (every > 0 and step // every > last // every))

        records = loop(resume_from=self.state, on_batch_end=on_batch_end, stop=stop)
        with closing(records):
            try:
                first = list(islice(records, 1))  # what does not fit shows in the first step, before anything is written
                processes.by_main(lambda: self._write_beginning(begun_at, watcher, before))
                agreed, failed = True, True
                try:
                    record_to(self.path, chain(first, records), show, self.tracker)
                    failed = False
                except _Enough:
                    failed = False
                    self.note(f"training ends here, as {'a callback' if asked else 'training.monitor.stop'} says")
                except (Interrupted, NonFiniteError, CollapseError):
                    raise
                except BaseException:
                    agreed = processes.count() == 1  # it may be of this process alone, and the others are not here to save
                    raise
                finally:
                    records.close()  # leaves the average of the weights in them
                    if agreed and (begun_at or first):
                        self._beside(save) if failed else save()
            except NonFiniteError as error:
                if error.where.get("process", 0) == processes.index():
                    self._beside(partial(diagnose, self.path, error))
                raise
            except UserCodeError as error:
                self._beside(partial(self._keep_traceback, error.traceback))
                raise
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                raise OutOfMemoryError(self._remedy(error)) from None


def claim(folder: Path) -> None:
    """Raises InputError if something is in `folder` already, but for the lock and what a run that failed at once has left."""
    if inside(folder):
        run = (folder / RECIPE).exists()
        hint = "; to go on with the run that is there, add --resume" if run else ""
        raise InputError(f"{folder}: already holds something; give a new --output, nothing was overwritten{hint}")


def inside(folder: Path) -> list[Path]:
    """What lies in a folder, but for the lock and diagnostics."""
    return [path for path in folder.iterdir() if path.name not in (DIAGNOSTICS, LOCK, HOLDER)]


def environment() -> dict[str, Any]:
    """What decides, beside the recipe, how numbers are rounded."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
    return machine | {"processes": processes.count()}


def refuse_changes(path: Path, recipe: Any) -> None:
    """Raises InputError if `recipe` is not the one of the run in `path`, other than where it makes no difference: a setting
    that an earlier version did not have yet was as it is by default, and what has been moved is still the same."""
    before = move_old_keys(read_yaml(path / RECIPE))
    with suppress(InputError):
        known = absolute(validate(type(recipe), before, str(path / RECIPE)))
        before = known.model_dump(mode="json")
        prints, own = read_fingerprints(path) or {}, fingerprints(recipe)
        names = {place: value for place, value, _ in externals(recipe)}
        for place, _, _ in externals(known):
            if place in names and (key := dotted(place)) in prints and prints[key] == own.get(key):
                put(before, place, names[place])
    then, now = flat(before), flat(recipe.model_dump(mode="json"))
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    steps = "training.max_train_steps"
    free = [*FREE_TO_CHANGE, *([steps] if recipe.optimizer.lr_scheduler == "constant" else [])]
    unsafe = [key for key in changed if not any(key == name or key.startswith(f"{name}.") for name in free)]
    if unsafe:
        listed = "; ".join(f"{key} {then.get(key)!r} -> {now.get(key)!r}" for key in unsafe[:5])
        more = f" and {len(unsafe) - 5} more" if len(unsafe) > 5 else ""
        why = " (its learning rate depends on it)" if unsafe == [steps] else ""
        raise InputError(
            f"{path}: the run was begun with another recipe: {listed}{more}{why}; put it back, or train into a new folder"
        )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys.

    >>> flat({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    joined: dict[str, Any] = {}
    for key, value in tree.items():
        joined |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return joined


def diagnose(path: Path, error: NonFiniteError) -> None:
    """Leave what is known of a number that is not finite in diagnostics/."""
    folder = path / DIAGNOSTICS / f"step-{error.where.get('step', 0):08d}"
    tensors = {key: value for key, value in error.tensors.items() if isinstance(value, Tensor)}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if tensors:
            write_tensors(folder / "tensors.safetensors", tensors)
    write_json(folder / "report.json", {"error": str(error), **error.where, "tensors": sorted(tensors)})


def of_monitor(folder: Path) -> dict[str, Any]:
    """What a run's monitor found, for its summary: the first alarm, and the step of the best model."""
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


def record_to(folder: Path, records: Iterable[Record], show: Callable[[Record], None], tracker: Tracker | None) -> None:
    """Add each training record to `metrics.jsonl` as a line, and show it."""
    if not processes.is_main():
        for _ in records:
            pass
        return
    for record in records:
        row: dict[str, Any] = {"step": record.step, "seconds": round(record.seconds, 3)}
        row |= {"network_evaluations": record.network_evaluations, "samples_drawn": record.samples_drawn}
        append_row(folder / METRICS, row | record.metrics)
        show(record)
        if tracker is not None:
            tracker.scalars(row | record.metrics, record.step)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that are as they were written; a warning says how many are not. A last one that a killed
    process has not finished is left out.

    Raises InputError if there are none.
    """
    rows, damaged = known_records(folder)
    if not rows:
        raise InputError(f"{folder / METRICS}: holds no step of a training run")
    if damaged:
        warnings.warn(f"{folder / METRICS}: {damaged} lines are damaged and left out", Note, stacklevel=2)
    return rows


def read_run_tree(folder: Path) -> dict[str, Any]:
    """The recipe of any run, not yet validated. Raises InputError if `folder` is not a run with a tuned model."""
    for needed in (RECIPE, "model", METRICS):
        if not (folder / needed).exists():
            raise InputError(f"{folder}: not a run folder, it has no {needed}")
    refuse_links(folder)
    return move_old_keys(read_yaml(folder / RECIPE))


def refuse_links(folder: Path) -> None:
    """Raises InputError if something in a run is a link: it would be written through, or uploaded, without being in the run."""
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in OF_TRACKERS]
        for name in (*folders, *files):
            if (path := Path(place, name)).is_symlink():
                raise InputError(
                    f"{path}: is a link, and links are not followed out of a run; put what it leads to in its place"
                )


OF_TRACKERS = ("logs", "wandb")
"""Folders in a run that are written by others."""


def write_yaml(path: Path, tree: Any) -> None:
    """Write at once or not at all."""
    write_text(path, dump_yaml(tree), durable=True)
