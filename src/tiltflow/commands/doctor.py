"""`tiltflow doctor`: examine a recipe before it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from tiltflow.commands.terminal.console import escape, make_console, print_json
from tiltflow.commands.terminal.exit_codes import FAILURE
from tiltflow.commands.terminal.options import AllowCode, Device, Json, Seed, Set, Threads, TrainRecipe, set_up_torch, with_seed
from tiltflow.errors import InputError

ConfigOnly = Annotated[
    bool,
    typer.Option("--config-only", help="Forecast the memory of a pipeline from its configs: no weights are read or fetched."),
]
MemoryOfDevice = Annotated[
    float | None,
    typer.Option("--memory", min=0.1, help="With --config-only: gigabytes of a GPU that is not here.", metavar="GB"),
]


def doctor(
    recipe: TrainRecipe,
    overrides: Set = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
    config_only: ConfigOnly = False,
    memory: MemoryOfDevice = None,
    as_json: Json = False,
) -> None:
    """Check a recipe for errors, and estimate its cost, before it runs. Trains for an iteration or two, and writes nothing.
    Exit code 1 if a check is red. A recipe can run code: the Python functions that it names.

    [dim]tiltflow doctor digits-even[/dim]
    [dim]tiltflow doctor mine.yaml --set training.micro_batch_size=4 --device cuda[/dim]
    [dim]tiltflow doctor sd35-medium-24gb --config-only --memory 24[/dim]
    """
    from dataclasses import asdict

    from tiltflow.runs.doctor import Finding, examine, foresee, refuse, verdict
    from tiltflow.runs.recipe import find_recipe, read_recipe, read_recipe_tree

    if memory is not None and not config_only:
        raise InputError("--memory: only a forecast from configs can be of a GPU that is not here; add --config-only")
    console, found = make_console(as_json), list[Finding]()
    colours = {"green": "green", "amber": "yellow", "red": "red bold"}

    def show(finding: Finding) -> None:
        found.append(finding)
        colour = colours[finding.level]
        level = f"[{colour}]{finding.level:6}[/{colour}]"
        first, *more = finding.text.splitlines()
        console.print(f"{level} [bold]{escape(finding.check)}[/bold]  {escape(first)}", soft_wrap=True)
        for line in more:
            console.print(escape(line), soft_wrap=True)
        for line in finding.remedy.splitlines():
            console.print(f"       [dim]{escape(line)}[/dim]", soft_wrap=True)

    path = find_recipe(recipe, "train")
    try:
        settings = read_recipe(read_recipe_tree(path, with_seed(overrides, seed)), recipe)
    except InputError as error:
        show(refuse(error))
    else:
        found_device = set_up_torch(device, threads)
        findings = foresee(settings, found_device, memory) if config_only else examine(settings, found_device)
        for finding in findings:
            show(finding)
    print_json(as_json, {"verdict": verdict(found), "findings": [asdict(finding) for finding in found]})
    if verdict(found) == "red":
        raise typer.Exit(FAILURE)
