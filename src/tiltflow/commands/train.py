"""`tiltflow train`: tune a model."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tiltflow.commands.terminal.console import escape, is_main_process, make_console, print_json
from tiltflow.commands.terminal.exit_codes import CTRL_C, exit_code
from tiltflow.commands.terminal.options import (
    AcceptChanges,
    AllowCode,
    Device,
    Json,
    Output,
    Quiet,
    Seed,
    Set,
    Threads,
    TrainRecipe,
    set_up_torch,
    with_seed,
)
from tiltflow.commands.terminal.progress import stages_progress, training_progress
from tiltflow.commands.terminal.summary import print_stage, print_stages, print_summary
from tiltflow.errors import Interrupted

if TYPE_CHECKING:
    from tiltflow.runs.recipe import Recipe
    from tiltflow.runs.staged.recipe import StagedRecipe


def train(
    recipe: TrainRecipe,
    output: Output,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --output from its latest checkpoint, or start it.")
    ] = False,
    overrides: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
    accept_changes: AcceptChanges = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Tune a model toward a reward, and report how far it is from its target law; or, in stages, toward a utility of the law.

    A recipe can run code: the Python functions that it names. Use only recipes of people whom you trust. Code in the folder of
    a run needs --allow-code.

    One folder holds everything: recipe, metrics, weights, pictures, summary.json and report.html. Ctrl-C, SIGTERM, SIGHUP and
    SIGUSR1 save a checkpoint; rerun with --resume to continue, bit for bit as without the stop.

    [dim]tiltflow train digits-even --output runs/even[/dim]
    [dim]tiltflow train digits-even --output runs/even --resume[/dim]
    [dim]accelerate launch -m tiltflow train mine.yaml --output runs/mine[/dim]
    [dim]tiltflow train digits-even --output runs/mine --set method.beta=3 --set reward.classes=1,7[/dim]
    """
    from tiltflow import processes
    from tiltflow.runs.checkpoint import saved_in
    from tiltflow.runs.recipe import find_recipe, read_recipe, read_recipe_tree
    from tiltflow.runs.staged.recipe import StagedRecipe

    path = find_recipe(recipe, "train")
    going_on = ["training.resume_from_checkpoint=latest"] if resume else []
    settings = read_recipe(read_recipe_tree(path, [*with_seed(overrides, seed), *going_on]), recipe)
    training, console, quiet = settings.training, make_console(as_json), quiet or not is_main_process()
    note = partial(print_note, console)
    chosen = processes.begin(set_up_torch(device, threads))
    if not quiet:
        console.print(f"[bold]{escape(settings.description or path.stem)}[/bold]")

    if training.samples_per_step % processes.count():
        note(uneven(training.samples_per_step))
    staged = isinstance(settings, StagedRecipe)
    try:
        if isinstance(settings, StagedRecipe):
            summary = train_stages(settings, output, console, quiet, chosen)
        else:
            summary = train_once(settings, output, console, quiet, chosen)
    except (Interrupted, KeyboardInterrupt) as error:
        if not staged and isinstance(error, KeyboardInterrupt):
            raise
        does = "to continue" if saved_in(output) else "to start again; nothing was saved"
        console.print(f"{escape(str(error) or 'interrupted between two trainings')}; rerun with --resume {does}")
        processes.end()
        raise typer.Exit(CTRL_C if isinstance(error, KeyboardInterrupt) else exit_code(error)) from None
    processes.end()
    (print_stages if staged else print_summary)(console, summary, output)
    print_json(as_json, summary)


def train_once(recipe: Recipe, output: Path, console: Console, quiet: bool, device: str) -> dict[str, Any]:
    """Train one run, and show its steps."""
    from tiltflow.runs.run import run

    note = partial(print_note, console)
    with training_progress(console, quiet, recipe.training.max_train_steps) as watch:
        return run(recipe, output, device=device, callbacks=[watch], note=note, handle_signals=True)


def train_stages(recipe: StagedRecipe, output: Path, console: Console, quiet: bool, device: str) -> dict[str, Any]:
    """Train all stages, and show the steps of each, and a line of each that is finished."""
    from tiltflow.runs.staged.run import run_stages

    count, note = recipe.stages.count, partial(print_note, console)
    assert count is not None

    with stages_progress(console, quiet, count, recipe.training.max_train_steps) as (watch, ended):

        def finished(stage: Any) -> None:
            ended(stage.number)
            if not quiet:
                print_stage(console, stage, count)

        return run_stages(recipe, output, device=device, callbacks=[watch], watch=finished, note=note, handle_signals=True)


def print_note(console: Console, text: str) -> None:
    """Print a note in one line."""
    with suppress(OSError):  # the terminal was closed: no reason to stop
        console.print(f"[yellow]{escape(text)}[/yellow]")


def uneven(batch: int) -> str:
    """Return the note on a batch that the processes cannot share evenly."""
    from tiltflow import processes

    several, each = processes.count(), processes.share_of(batch)
    return (
        f"{several} processes cannot share {batch} samples evenly: each computes {each}, some of them twice;"
        f" a batch of {each * several} takes the same time"
    )
