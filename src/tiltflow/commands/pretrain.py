"""`tiltflow pretrain`: train a small model from images, molecules or transitions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltflow.commands.terminal.console import escape, make_console, print_json, print_table, spinner
from tiltflow.commands.terminal.options import (
    Device,
    Json,
    Output,
    Quiet,
    Seed,
    Set,
    Threads,
    completes,
    recipe_names,
    set_up_torch,
    with_seed,
)
from tiltflow.commands.terminal.progress import training_progress


def pretrain(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name of a pretraining recipe, see `tiltflow recipes`, or a .yaml file.",
            autocompletion=completes(recipe_names("pretrain")),
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="An .npz file with x_train, y_train, .. or a folder of images; for molecules a file of SMILES, or an .npz"
            " file of geometries; for a policy an .npz file of transitions."
        ),
    ],
    output: Output,
    score: Annotated[
        bool, typer.Option("--score", help="Train nothing: measure the model that is in the output, and update its card.")
    ] = False,
    overrides: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a small flow, diffusion model, classifier or text-to-image pipeline from images, a flow from molecules, or a
    policy from transitions, as the shipped models were.

    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end the training early, and save the model as it then is.

    [dim]tiltflow pretrain digits-flow --data mnist.npz --output models/flow[/dim]
    [dim]tiltflow pretrain tiles-pipeline --data tiles.npz --output models/tiles[/dim]
    [dim]tiltflow pretrain qm9-flow --data qm9_smiles.csv.gz --output models/molecules[/dim]
    [dim]tiltflow pretrain behaviour-policy --data cube-single.npz --output models/behaviour[/dim]
    """
    from tiltflow.pretraining.recipe import read_pretraining
    from tiltflow.pretraining.run import run_pretraining, score_again

    changes = with_seed(overrides, seed)
    chosen = set_up_torch(device, threads)
    console = make_console(as_json)
    settings = read_pretraining(recipe, changes)
    if score:
        with spinner(console, quiet, "measuring"):
            scores = score_again(settings, data, output)
    else:
        with training_progress(console, quiet, settings.max_train_steps) as watch:
            scores = run_pretraining(settings, data, output, name=recipe, device=chosen, watch=watch)
    if not quiet:
        print_table(
            console, {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in scores.items()}, "score"
        )
        console.print(f"model in {escape(output)}")
    print_json(as_json, {"output": str(output), **scores})
