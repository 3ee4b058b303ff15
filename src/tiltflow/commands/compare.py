"""`tiltflow compare`: train methods under one budget, and compare them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tiltflow import plugins
from tiltflow.commands.terminal.console import escape, make_console, print_json
from tiltflow.commands.terminal.exit_codes import FAILURE
from tiltflow.commands.terminal.options import AllowCode, Device, Json, Quiet, Threads, set_up_torch
from tiltflow.commands.terminal.progress import jobs_progress
from tiltflow.formatting import decimal


def compare(
    methods: Annotated[str, typer.Option(metavar="A,B,..", help=f"{', '.join(plugins.names('methods'))}.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; new, empty, or that of this comparison.")],
    problems: Annotated[str, typer.Option(metavar="A,B,..", help="Problems of `tiltflow verify`.")] = "",
    recipes: Annotated[str, typer.Option(metavar="A,B,..", help="Recipes by name, or .yaml files.")] = "",
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0 on.")] = 5,
    network_evaluations: Annotated[
        float | None,
        typer.Option(help="Budget of each training: evaluations of the network, of one sample.", show_default="none"),
    ] = None,
    reward_evaluations: Annotated[
        float | None, typer.Option(help="Budget of each training: rewards of samples.", show_default="none")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Budget of each training: seconds on this machine.", show_default="none")
    ] = None,
    tune: Annotated[
        str, typer.Option(help="What is tuned first, by the same rule for each method: learning-rate, or none.")
    ] = "learning-rate",
    beta: Annotated[
        float | None,
        typer.Option(help="Temperature of the target law.", show_default="1 for problems, the recipe's own for recipes"),
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Samples of each measurement on a problem.")] = 4000,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="NAME.KEY=VALUE", help="Override a setting of a method, problem or recipe."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of trainings at a time.")] = 1,
    threads: Threads = None,
    device: Device = "auto",
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train methods on the same problems and recipes with the same seeds under one budget, and compare what they reach.

    Give exactly one budget; all three are counted. Each learning rate is tuned by the same rule first. The same command
    again goes on where it stopped; it may have more methods, problems, recipes or seeds. In a recipe, each method has its own
    defaults in place of the recipe's method and optimizer. A recipe can run code: the Python functions that it names.

    [dim]tiltflow compare --methods draft,dpok --problems gaussian,mixture --network-evaluations 2e6 --output runs/compare[/dim]
    [dim]tiltflow compare --methods dpok,flow-grpo --recipes digits-even --seeds 3 --seconds 120 --output runs/digits[/dim]
    [dim]tiltflow compare --methods draft,refl --problems mixture --set mixture.dimension=16 --seconds 60 -o runs/16[/dim]
    """
    from tiltflow.runs.comparison.budget import Budget
    from tiltflow.runs.comparison.compare import compare as run_comparison
    from tiltflow.runs.comparison.compare import trainings, units
    from tiltflow.runs.comparison.plan import Plan

    console = make_console(as_json)
    budget = Budget.of(network_evaluations, reward_evaluations, seconds)
    chosen = set_up_torch(device, threads)
    listed = (split(methods), split(problems), split(recipes))
    plan = Plan.of(
        *listed,
        seeds=seeds,
        budget=budget,
        tune=tune,
        beta=beta,
        num_samples=num_samples,
        settings=overrides or [],
    )
    with jobs_progress(console, quiet, units(plan), trainings(plan)) as jobs:
        result = run_comparison(plan, output, processes=processes, device=chosen, watch=jobs.ended, moving=jobs.moved)
    for each in result["results"]:
        print_subject(console, each)
    for title, error in result["failed"].items():
        console.print(f"[yellow]{escape(title)}: {escape(error)}[/yellow]")
    console.print(f"report: {escape(output / 'report.html')}")
    print_json(as_json, result)
    if result["failed"]:
        raise typer.Exit(FAILURE)


def split(text: str) -> list[str]:
    """
    >>> split("a, b,")
    ['a', 'b']
    """
    return [name.strip() for name in text.split(",") if name.strip()]


def print_subject(console: Console, found: Mapping[str, Any]) -> None:
    """Print a line for each method: means over seeds, and below them their standard errors; eighty columns are enough."""
    from rich.table import Table

    floors = [each["floor"]["mean"] for each in found["methods"] if each["floor"]["mean"] is not None]
    title = found["subject"] + (f": floor of the distance {decimal(max(floors))}" if floors else "")
    table = Table(box=None, header_style="bold", pad_edge=False, title=escape(title), title_justify="left")
    columns = {"reward": "reward", "distance": "distance", "achieved_tilt": "tilt", "diversity": "diversity"}
    columns |= {"network_evaluations": "evals", "seconds": "s"}
    others = list(found["held_out_base"])
    for column in ("method", *columns.values(), *others, "n"):
        table.add_column(escape(column), no_wrap=column == "method", overflow="fold")
    for method in found["methods"]:
        cells = [cell(method[column], errors=column in ("reward", "distance")) for column in columns]
        cells += [cell(method["held_out"][name], errors=True) for name in others]
        table.add_row(escape(method["method"]), *cells, str(method["n"]))
    console.print(table)


def cell(number: Mapping[str, Any], *, errors: bool) -> str:
    """A mean over seeds and, below it, its standard error.

    >>> cell({"mean": 29.50467, "error": 0.0032}, errors=True), cell({"mean": 99840.0, "error": 0.0}, errors=False)
    ('29.5047\\n± 0.0032', '100k')
    """
    mean, error = number["mean"], number["error"]
    if mean is None:
        return "–"
    if not errors:
        return f"{mean:.3g}" if abs(mean) >= 1e8 else f"{mean / 1000:.0f}k" if abs(mean) >= 1e4 else decimal(mean)
    return decimal(mean, error).replace(" ± ", "\n± ")
