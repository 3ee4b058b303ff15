"""`tiltflow generate-ogbench`: data sets of play for control."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltflow.commands.terminal.console import escape, make_console, print_json
from tiltflow.commands.terminal.options import Json, Quiet


def generate_ogbench(
    environment: Annotated[str, typer.Argument(help="Name of an environment of OGBench: cube-single, scene, puzzle-3x3, ..")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npz file to write.")],
    task: Annotated[int, typer.Option(min=1, help="Number of the task that rewards are for.")] = 1,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes of play; OGBench's own data sets have 1000.")] = 1000,
    steps: Annotated[int, typer.Option(min=2, help="Rows of an episode.")] = 1001,
    data: Annotated[
        Path | None, typer.Option(help="Play nothing: a data set of this environment, whose rewards are computed for the task.")
    ] = None,
    sparse: Annotated[bool, typer.Option("--sparse", help="Rewards of -1 until the task is over, not of sub-goals.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all episodes.")] = 0,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one to a core")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Generate a data set of play with OGBench's own scripted oracles, with the rewards of a task.

    Interrupted, it goes on where it was when it is run again.

    [dim]tiltflow generate-ogbench cube-single --task 1 --output cube-single.npz[/dim]
    [dim]tiltflow generate-ogbench cube-single --task 2 --data cube-single.npz --output cube-single-task2.npz[/dim]
    """
    from tiltflow.policies.environments import check_environment
    from tiltflow.policies.generation import Play, generate, relabel

    check_environment(environment, task)
    console, every = make_console(as_json), max(1, episodes // 20)

    def watch(done: int) -> None:
        if not quiet and (done % every == 0 or done == episodes):
            console.print(f"{done} of {episodes} episodes")

    if data is not None:
        rows = relabel(data, output, environment, task=task, sparse=sparse)
    else:
        wanted = Play(environment, episodes, steps, seed)
        rows = generate(wanted, output, task=task, sparse=sparse, processes=processes, watch=watch)
    solved = float((rows["masks"] == 0).mean())
    if not quiet:
        console.print(f"{len(rows['masks']):,} rows, {solved:.1%} of which have the task solved, in {escape(output)}")
    print_json(as_json, {"output": str(output), "rows": len(rows["masks"]), "solved": solved})
