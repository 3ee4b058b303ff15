"""`tiltflow pretrain`: train a small model from images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltflow.commands.terminal.console import escape, make_console, print_json, print_table
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
            help="A pretraining recipe of `tiltflow recipes`, or a .yaml file.",
            autocompletion=completes(recipe_names("pretrain")),
        ),
    ],
    data: Annotated[Path, typer.Option(help="An .npz file with x_train, y_train, .. or a folder of images.")],
    output: Output,
    overrides: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a small flow, diffusion model, classifier or text-to-image pipeline from images. The shipped ones were made so.

    [dim]tiltflow pretrain digits-flow --data mnist.npz --output models/flow[/dim]
    [dim]tiltflow pretrain tiles-pipeline --data tiles.npz --output models/tiles[/dim]
    """
    from tiltflow.pretraining.pretrain import pretraining_of, run_pretraining
    from tiltflow.runs.recipe import find_recipe, read_recipe_tree

    changes = with_seed(overrides, seed)
    chosen = set_up_torch(device, threads)
    console = make_console(as_json)
    tree = read_recipe_tree(find_recipe(recipe, "pretrain"), changes)
    if tree.get("task") == "text-to-image":
        from tiltflow.pretraining.pretrain_pipeline import PipelinePretraining, run_pipeline_pretraining
        from tiltflow.settings import validate

        pipeline = validate(PipelinePretraining, tree, recipe)
        steps = pipeline.autoencoder.max_train_steps + pipeline.training.max_train_steps
        with training_progress(console, quiet, steps, pipeline.training.train_batch_size) as watch:
            scores = run_pipeline_pretraining(pipeline, data, output, name=recipe, device=chosen, watch=watch)
    else:
        settings = pretraining_of(tree, recipe)
        with training_progress(console, quiet, settings.training.max_train_steps, settings.training.train_batch_size) as watch:
            scores = run_pretraining(settings, data, output, name=recipe, device=chosen, watch=watch)
    if not quiet:
        print_table(
            console, {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in scores.items()}, "score"
        )
        console.print(f"model in {escape(output)}")
    print_json(as_json, {"output": str(output), **scores})
