"""`tiltflow evaluate`: repeat the evaluation of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltflow.commands.terminal.console import make_console, print_json, spinner
from tiltflow.commands.terminal.options import AcceptChanges, AllowCode, Device, Json, Quiet, Threads, set_up_torch
from tiltflow.commands.terminal.summary import print_stages, print_summary


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a training run.")],
    num_samples: Annotated[
        int | None, typer.Option(min=2, help="Number of samples of each model.", show_default="the recipe's")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
    accept_changes: AcceptChanges = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Repeat the evaluation of a run from its folder; overwrites its summary, pictures and report.

    Of a run of stages the utility is estimated anew, of the last model, or of that of one stage: RUN/stage-02.

    A recipe can run code: the Python functions that it names. Code in the folder of the run needs --allow-code.

    [dim]tiltflow evaluate runs/even --num-samples 5000[/dim]
    """
    from tiltflow.api import evaluate as evaluate_it

    console = make_console(as_json)
    chosen = set_up_torch(device, threads)
    with spinner(console, quiet, "sampling the base and the tuned model"):
        summary = evaluate_it(folder, device=chosen, num_samples=num_samples)
    (print_stages if "stages" in summary else print_summary)(console, summary, folder)
    print_json(as_json, summary)
