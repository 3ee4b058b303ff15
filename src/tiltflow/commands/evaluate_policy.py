"""`tiltflow evaluate-policy`: episodes of a policy in an environment."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from tiltflow.commands.terminal.console import make_console, print_json, print_table, spinner
from tiltflow.commands.terminal.options import Device, Json, Quiet, Threads, set_up_torch


def evaluate_policy(
    model: Annotated[Path, typer.Argument(help="A policy: the folder of a model or of a run.")],
    environment: Annotated[str, typer.Option(help="Name of an environment of OGBench.")],
    task: Annotated[int, typer.Option(min=1, help="Number of its task.")] = 1,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the episodes.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Play episodes of a task in one of OGBench's environments: how often does a policy succeed?

    [dim]tiltflow evaluate-policy runs/qam --environment cube-single --task 1[/dim]
    """
    from tiltflow.evaluation.episodes import play_episodes, summary_of
    from tiltflow.models.policy import load_policy
    from tiltflow.policies.environments import check_environment, make

    check_environment(environment, task)
    policy = load_policy(model, set_up_torch(device, threads))
    console = make_console(as_json)
    with spinner(console, quiet, "playing"):
        found = summary_of(play_episodes(policy, partial(make, environment, task), episodes, seed=seed))
    low, high = found["success_rate_interval"]
    error = "" if found["return_error"] is None else f" ± {found['return_error']:.1f}"
    if not quiet:
        rows = {
            "success rate": f"{found['success_rate']:.1%} of {episodes} episodes (95 %: {low:.1%} to {high:.1%})",
            "mean return": f"{found['return']:.1f}{error}",
            "mean length": f"{found['steps']:.0f} steps",
        }
        print_table(console, rows, f"{environment}, task {task}")
    print_json(as_json, {"model": str(model), "environment": environment, "task": task, "seed": seed, **found})
