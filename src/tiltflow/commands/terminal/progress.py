"""Progress: a bar in a terminal and in a notebook, lines elsewhere."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tiltflow.commands.terminal.console import escape, is_main_process, make_console
from tiltflow.formatting import duration

if TYPE_CHECKING:
    from rich.progress import Progress

    from tiltflow.pretraining.loop import Progress as PretrainingRecord
    from tiltflow.training.trainer import Record


Watch = Callable[["Record | PretrainingRecord"], None]
"""Type of a callback that shows training records."""


def tune_progress(wanted: bool | None, total: int, *, evaluated: bool) -> AbstractContextManager[Watch]:
    """Show the progress of `tiltflow.tune`.

    Args:
        wanted: whether to show it; None for only in a terminal or a notebook.
        total: number of steps.
        evaluated: whether an evaluation follows.
    """
    console = make_console(as_json=False)
    shown = console.is_terminal or console.is_jupyter if wanted is None else wanted
    return training_progress(console, not shown or not is_main_process(), total, "now evaluating" if evaluated else "")


@contextmanager
def training_progress(console: Console, quiet: bool, total: int, afterwards: str = "now evaluating") -> Iterator[Watch]:
    """Yield a callback that shows training records: a bar in a terminal or a notebook, elsewhere ten lines. The rate is in
    samples drawn per second; in pretraining, in images of the data.

    Args:
        total: number of steps.
        afterwards: text after the last step.
    """
    if quiet:
        yield lambda record: None
    elif console.is_jupyter:
        yield notebook_bar(total)
    elif console.is_terminal:
        with terminal_bar(console, total, afterwards) as watch:
            yield watch
    else:

        def write(record: Record | PretrainingRecord) -> None:
            if record.step % max(total // 10, 1) == 0:
                with suppress(OSError):  # the pipe was closed
                    console.print(f"{record.step}/{total}  {numbers(record)}  {record.seconds:.0f} s")

        yield write


@contextmanager
def stages_progress(
    console: Console, quiet: bool, count: int, total: int
) -> Iterator[tuple[Callable[[Record], None], Callable[[int], None]]]:
    """Yield a callback that shows the training records of stages as those of one training, and a function that is told the
    number of each stage that is finished.

    Args:
        count: number of stages.
        total: number of steps of each.
    """
    done = 0

    def ended(number: int) -> None:
        nonlocal done
        done = number

    with training_progress(console, quiet, count * total) as watch:
        yield lambda record: watch(replace(record, step=done * total + record.step)), ended


def numbers(record: Record | PretrainingRecord) -> str:
    """Format the numbers of a record that are shown during training."""
    from tiltflow.training.trainer import Record

    shown = record.metrics if isinstance(record, Record) else {"loss": record.loss}
    parts = [f"{key} {shown[key]:.3f}" for key in ("reward", "loss") if key in shown]
    done = record.samples_drawn if isinstance(record, Record) else record.samples
    return "  ".join([*parts, f"{done / max(record.seconds, 1e-9):.0f} samples/s"])


@contextmanager
def terminal_bar(console: Console, total: int, afterwards: str) -> Iterator[Watch]:
    """Yield a callback that updates a progress bar of rich."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[stage]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("train", total=total, metrics="", stage="")

        def watch(record: Record | PretrainingRecord) -> None:
            stage = "left" if record.step < total else afterwards
            with suppress(OSError):  # the terminal was closed
                bar.update(task, completed=record.step, metrics=numbers(record), stage=stage)

        yield watch
        with suppress(OSError):
            bar.update(task, stage="")  # the final state of the bar


SECONDS_BETWEEN_DRAWINGS = 0.2
"""Least time between updates in a notebook, where each is a message to the browser."""


def notebook_bar(total: int) -> Watch:
    """Return a callback that updates a bar in a notebook, in HTML: rich would need ipywidgets."""
    display: Any = importlib.import_module("IPython.display")
    drawn = -math.inf

    def bar(step: int, text: str) -> object:
        return display.HTML(f'<progress value="{step}" max="{total}"></progress> {step}/{total}  {text}')

    handle = display.display(bar(0, ""), display_id=True)

    def watch(record: Record | PretrainingRecord) -> None:
        nonlocal drawn
        if record.step < total and record.seconds < drawn + SECONDS_BETWEEN_DRAWINGS:
            return
        drawn = record.seconds
        handle.update(bar(record.step, f"{numbers(record)}  {record.seconds:.0f} s"))

    return watch


@contextmanager
def sweep_progress(console: Console, quiet: bool, total: int) -> Iterator[Callable[[str, str], None]]:
    """Yield a callback (name of a run, how it ended) that shows the progress of a sweep.

    Args:
        total: number of runs.
    """
    with jobs_progress(console, quiet, total, total) as jobs:
        yield lambda name, what: jobs.ended(name, what, 1.0)


class Jobs:
    """Shows many jobs: a bar that moves within a job, too, and a line for each that ended, with its number and the time left.

    Args:
        total: the length of all of them, in any unit.
        count: how many there are, those without a length aside.
        bar: of rich, with one task.
    """

    def __init__(self, console: Console, quiet: bool, total: float, count: int, bar: Progress):
        self.console, self.quiet, self.total, self.count, self.bar = console, quiet, total, count, bar
        self.began, self.done, self.known, self.number = time.monotonic(), 0.0, 0.0, 0

    def ended(self, name: str, what: str, length: float) -> None:
        """A job has ended, or was there already."""
        if not self.done and not length:
            self.began = time.monotonic()  # what comes before the first job with a length says nothing of their speed
        self.done += length
        self.known += length if what == "already done" else 0.0
        self.number += length > 0
        self._draw(self.done, f"{self.number} of {self.count} done" if length else "")
        if not self.quiet:
            left = time_left(time.monotonic() - self.began, self.done - self.known, self.total - self.done)
            number = f"[{self.number}/{self.count}] " if length else ""
            self.console.print(f"{escape(number + name)}: {escape(what)}{'' if self.console.is_terminal else left}")

    def moved(self, name: str, share: float, length: float) -> None:
        """A share of a job is done."""
        self._draw(self.done + share * length, f"{self.number + 1} of {self.count}: {name}" if length else name)

    def _draw(self, completed: float, words: str) -> None:
        with suppress(OSError):  # the terminal was closed
            for task in self.bar.task_ids:
                self.bar.update(task, completed=completed, description=escape(words))


@contextmanager
def jobs_progress(console: Console, quiet: bool, total: float, count: int) -> Iterator[Jobs]:
    """Yield what shows the progress of many jobs; see `Jobs`."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        bar.add_task("", total=total)
        yield Jobs(console, quiet, total, count, bar)


def time_left(seconds: float, done: float, left: float) -> str:
    """What is left, in words, at the speed until now.

    >>> time_left(60.0, 2.0, 3.0), time_left(60.0, 2.0, 0.0)
    ('  (1 min 30 s left)', '')
    """
    return f"  ({duration(seconds / done * left)} left)" if done > 0 and left > 1e-9 else ""
