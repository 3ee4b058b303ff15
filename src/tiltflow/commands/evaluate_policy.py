"""`tiltflow evaluate-policy`: episodes of a policy in an environment."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tiltflow.commands.terminal.console import make_console, print_json, print_table, spinner
from tiltflow.commands.terminal.options import Device, Json, Quiet, Threads, set_up_torch

MILLISECONDS = 50
"""Of a step of OGBench's arm; a film has every fourth one."""


def evaluate_policy(
    model: Annotated[Path, typer.Argument(help="A policy: the folder of a model or of a run.")],
    environment: Annotated[str, typer.Option(help="Name of an environment of OGBench.")],
    task: Annotated[int, typer.Option(min=1, help="Number of its task.")] = 1,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes.")] = 50,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Rewards of -1 until the task is over, as the critics learned.")
    ] = False,
    best_of: Annotated[
        int, typer.Option(min=1, help="Of so many chunks take the one that the critics of the run value most (IFQL).")
    ] = 1,
    video: Annotated[Path | None, typer.Option(help="A .gif of the first episode to write.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the episodes.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Play episodes of a task in one of OGBench's environments: how often does a policy succeed?

    The policy of a run is sampled as the run samples it, and where critics were learned beside it, what they say of the first
    actions of the episodes is compared with the discounted returns.

    [dim]tiltflow evaluate-policy runs/qam --environment cube-single --task 1[/dim]
    """
    from tiltflow.errors import InputError
    from tiltflow.evaluation.episodes import BestOf, play_episodes, summary_of
    from tiltflow.files import check_output, write_file
    from tiltflow.policies.drawing import choose_renderer, frame
    from tiltflow.policies.environments import check_environment, make
    from tiltflow.reports.videos import save_frames
    from tiltflow.runs.policy_of_run import policy_of

    check_environment(environment, task)
    frames = list[Any]()

    def watch(world: Any, info: Mapping[str, Any]) -> None:
        frames.append(frame(world, info))

    if video is not None:
        check_output(video)
        choose_renderer()
    policy, valued = policy_of(model, set_up_torch(device, threads))
    if best_of > 1 and valued is None:
        raise InputError(f"--best-of {best_of}: {model} has no critics; give the folder of a run with reward q-function")
    actor = policy if valued is None or best_of == 1 else BestOf(policy, valued.values, best_of)
    console = make_console(as_json)
    with spinner(console, quiet, "playing"):
        played = play_episodes(
            actor,
            partial(make, environment, task, sparse=sparse),
            episodes,
            seed=seed,
            valued=valued,
            watch=watch if video else None,
        )
    found = summary_of(played)
    if video is not None:
        write_file(video, lambda draft: save_frames([*frames[:-1:4], frames[-1]], draft, 4 * MILLISECONDS))
    low, high = found["success_rate_interval"]
    error = "" if found["return_error"] is None else f" ± {found['return_error']:.1f}"
    if not quiet:
        rows = {
            "success rate": f"{found['success_rate']:.1%} of {episodes} episodes (95 %: {low:.1%} to {high:.1%})",
            "mean return": f"{found['return']:.1f}{error}",
            "mean length": f"{found['steps']:.0f} steps",
        }
        if "value" in found:
            rows["value at the start"] = f"{found['value']:.1f}, discounted return {found['discounted_return']:.1f}"
        if found.get("value_error") is not None:
            error = "" if found["value_error_error"] is None else f" ± {found['value_error_error']:.1f}"
            rows["less the return"] = (
                f"{found['value_error']:+.1f}{error}, of {found['episodes_with_known_return']} that were solved"
            )
        print_table(console, rows, f"{environment}, task {task}")
    print_json(
        as_json, {"model": str(model), "environment": environment, "task": task, "seed": seed, "best_of": best_of, **found}
    )
