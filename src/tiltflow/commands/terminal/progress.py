"""Progress: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from rich.console import Console

from tiltflow.commands.terminal.console import escape

if TYPE_CHECKING:
    from tiltflow.pretraining.loop import Progress as PretrainingRecord
    from tiltflow.training.trainer import Record


@contextmanager
def training_progress(console: Console, quiet: bool, total: int) -> Iterator[Callable[[Record | PretrainingRecord], None]]:
    """A callback for training records, which shows them; without a terminal, a line for each tenth of the work. The rate is
    that of the samples drawn; in pretraining, of images of the data.

    Args:
        total: the number of steps.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    from tiltflow.training.trainer import Record

    if quiet:
        yield lambda record: None
        return
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[stage]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=total, metrics="", stage="")

        def watch(record: Record | PretrainingRecord) -> None:
            shown = record.metrics if isinstance(record, Record) else {"loss": record.loss}
            parts = [f"{key} {shown[key]:.3f}" for key in ("reward", "loss") if key in shown]
            done = record.samples_drawn if isinstance(record, Record) else record.samples
            text = "  ".join([*parts, f"{done / max(record.seconds, 1e-9):.0f} samples/s"])
            stage = "left" if record.step < total else "now evaluating"
            with suppress(OSError):  # of a terminal that was closed
                bar.update(task, completed=record.step, metrics=text, stage=stage)
                if not console.is_terminal and record.step % max(total // 10, 1) == 0:
                    console.print(f"{record.step}/{total}  {text}  {record.seconds:.0f} s")

        yield watch


@contextmanager
def sweep_progress(console: Console, quiet: bool, total: int) -> Iterator[Callable[[str, str], None]]:
    """A callback for the runs of a sweep, called with the name of each and how it ended.

    Args:
        total: the number of runs.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("runs"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("sweep", total=total)

        def watch(name: str, what: str) -> None:
            bar.advance(task)
            if not quiet:
                console.print(f"{escape(name)}: {escape(what)}")

        yield watch
