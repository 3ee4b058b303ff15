"""Options and arguments that several verbs share, and shell completion."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from tiltflow.errors import InputError


def completes(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return a shell completion from names, which are looked up when it is used."""
    return lambda incomplete: [name for name in names() if name.startswith(incomplete)]


def recipe_names(kind: Literal["train", "pretrain"]) -> Callable[[], Iterable[str]]:
    """Return a function that lists the shipped recipes of a kind."""

    def names() -> Iterable[str]:
        from tiltflow.runs.recipe import shipped_recipes

        return shipped_recipes(kind)

    return names


def allow_code(context: typer.Context, asked: bool) -> bool:
    """Allow code in the folders of runs for the rest of the command, if --allow-code is set."""
    if asked:
        from tiltflow import plugins

        context.with_resource(plugins.allow_code())
    return asked


def accept_changes(context: typer.Context, asked: bool) -> bool:
    """Accept changed inputs of runs for the rest of the command, if --accept-changes is set."""
    if asked:
        from tiltflow.runs import fingerprints

        context.with_resource(fingerprints.accept_changes())
    return asked


TrainRecipe = Annotated[
    str,
    typer.Argument(
        help="Name of a recipe, see `tiltflow recipes`, or a .yaml file.", autocompletion=completes(recipe_names("train"))
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a setting of the recipe; see `tiltflow settings`."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line; all else goes to stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result, no progress.")]
Seed = Annotated[
    int | None, typer.Option(help="Seed; the same seed gives the same run, bit for bit.", show_default="the recipe's")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes any that is free.")]
NoiseSeed = Annotated[int, typer.Option(min=0, help="Seed of the noise; the same seed draws the same samples.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new or empty.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto: cuda if available, else cpu.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Number of CPU threads.", show_default="torch's choice")]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        callback=allow_code,
        help="Run Python code that came in the folder of a run or model, where its recipe names some: only if you trust it.",
    ),
]
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        callback=accept_changes,
        help="Go on although the base, the prompts or the reward are no longer those that the run began with.",
    ),
]


def with_seed(overrides: list[str] | None, seed: int | None) -> list[str]:
    """Return the overrides of --set, with --seed as one more."""
    return [*(overrides or []), *([f"seed={seed}"] if seed is not None else [])]


def set_up_torch(device: str, threads: int | None) -> str:
    """Set the number of CPU threads, and return the device: for `auto`, cuda if it is available, else cpu.

    Raises InputError if torch has no such device.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {device}: torch has no such device here; cpu always works") from None
    return device
