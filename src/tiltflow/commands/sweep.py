"""`tiltflow sweep`: train on a grid of settings."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tiltflow.commands.terminal.console import escape, make_console, print_json
from tiltflow.commands.terminal.exit_codes import FAILURE
from tiltflow.commands.terminal.options import AllowCode, Device, Json, Quiet, Set, TrainRecipe, set_up_torch
from tiltflow.commands.terminal.progress import sweep_progress


def sweep(
    recipe: TrainRecipe,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new, empty, or that of this sweep.")],
    over: Annotated[
        list[str] | None,
        typer.Option("--over", metavar="KEY=A,B,..", help="Values of a setting; may be repeated to make a grid."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Number of seeds of each point, from 0 on: the same as --over seed=0,1,..")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of runs at a time.")] = 1,
    overrides: Set = None,
    device: Device = "auto",
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train on a grid of settings, and plot the reward against the distance to the base.

    Each point is a run in a folder of its own. The same command again resumes with the points that are missing and the run that
    was cut off; it may have more values, such as seeds. Points that differ only in `seed` are shown as one, with the
    standard error over them; table.csv has all that was measured at each sampling point. A recipe can run code: the Python
    functions that it names.

    [dim]tiltflow sweep digits-even-orw --over method.alpha=0,0.3,1 --over method.tau=1,3 --output runs/sweep[/dim]
    [dim]tiltflow sweep digits-even --over method.beta=1,2,4 --seeds 3 --processes 2 --output runs/betas[/dim]
    """
    from tiltflow.runs.recipe import find_recipe, read_recipe_tree
    from tiltflow.runs.sweep import parse_grid
    from tiltflow.runs.sweep import sweep as run_sweep

    grid, console = parse_grid(over or [], seeds), make_console(as_json)
    tree = read_recipe_tree(find_recipe(recipe, "train"), overrides or [])
    chosen, count = set_up_torch(device, None), prod(len(values) for values in grid.values())
    with sweep_progress(console, quiet, count) as watch:
        result = run_sweep(tree, grid, output, processes=processes, device=chosen, watch=watch)
    print_sweep(console, result, [key for key in grid if key != "seed"])
    console.print(f"front: {escape(output / 'pareto.svg')}")
    print_json(as_json, result)
    if any("error" in row for row in result["runs"]):
        raise typer.Exit(FAILURE)


def print_sweep(console: Console, result: dict[str, Any], keys: list[str]) -> None:
    """Print one line for each point of the grid, over its seeds."""
    from rich.table import Table

    from tiltflow.runs.sweep import DISTANCES, short_names

    names, cost = list(short_names(keys).values()), result["distance"]
    variety = {"entropy_tuned": "entropy", "vendi_tuned": "Vendi"}
    kind = next((key for key in variety if any(key in row for row in result["points"])), "entropy_tuned")
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in (*names, "reward", DISTANCES[cost], variety[kind], "runs", ""):
        table.add_column(column, no_wrap=column in (*names, "runs"))
    for row in result["points"]:
        values = [escape(str(row[name])) for name in names]
        if "error" in row:
            table.add_row(*values, f"[yellow]{escape(row['error'])}[/yellow]", "", "", str(row["runs"]), "")
            continue
        differ = f"{row[kind]:.2f}" if kind in row else ""
        reward, distance = (with_error(row[key], row[f"{key}_error"]) for key in ("reward_tuned", cost))
        table.add_row(*values, reward, distance, differ, str(row["runs"]), "front" if row["on_front"] else "")
    console.print(table)


def with_error(value: float, error: float | None) -> str:
    """Format a mean over seeds, with its standard error if there are several.

    >>> with_error(0.25, 0.03), with_error(0.25, None)
    ('0.250 ± 0.030', '0.250')
    """
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"
