"""`tiltflow evaluate-policy`: episodes of a policy in an environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tiltflow.commands.terminal.console import make_console, print_json, print_table, spinner
from tiltflow.commands.terminal.options import AllowCode, Device, Json, Quiet, Threads, set_up_torch

MILLISECONDS = 50
"""Of a step of OGBench's arm."""


def evaluate_policy(
    model: Annotated[Path, typer.Argument(help="A policy: the folder of a model or of a run.")],
    environment: Annotated[
        str, typer.Option(help="Name of an environment of OGBench; or package.module:function, which makes one of gymnasium.")
    ],
    task: Annotated[int, typer.Option(min=1, help="Number of its task, of OGBench.")] = 1,
    episodes: Annotated[int, typer.Option(min=1, help="Episodes.")] = 50,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Rewards of -1 until the task is over, as the critics learned.")
    ] = False,
    best_of: Annotated[
        int, typer.Option(min=1, help="Of so many chunks take the one that the critics of the run value most (IFQL).")
    ] = 1,
    base: Annotated[bool, typer.Option(help="Play the policy that a run began with too, from the same beginnings.")] = True,
    films: Annotated[int, typer.Option(min=0, help="First episodes of each policy that are seen in the report of a run.")] = 3,
    video: Annotated[Path | None, typer.Option(help="A .gif of the first episode to write.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the episodes.")] = 0,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Play episodes of a task: how often does a policy succeed? Of a run its base is played too, and its report shows them.

    The policy of a run is sampled as the run samples it, and where critics were learned beside it, what they say of the first
    actions of the episodes is compared with the discounted returns.

    [dim]tiltflow evaluate-policy runs/qam --environment cube-single --task 1[/dim]
    """
    from tiltflow.evaluation.episodes import summary_of
    from tiltflow.files import check_output, write_file
    from tiltflow.reports.videos import save_frames
    from tiltflow.runs.play import Asked, play

    if video is not None:
        check_output(video)
    chosen, console = set_up_torch(device, threads), make_console(as_json)
    asked = Asked(environment, task, sparse, episodes, best_of, seed, base, films, video is not None)
    with spinner(console, quiet, "playing"):
        played, film = play(model, asked, device=chosen)
    if video is not None and film is not None:
        apart = MILLISECONDS * max(film.frames) / max(1, len(film.frames) - 1)
        write_file(video, lambda draft: save_frames(list(film.frames.values()), draft, round(apart)))
    known = {name: summary_of([each.episode for each in several]) for name, several in played.policies.items()}
    if not quiet:
        print_table(console, rows_of(**known), played.title)
        if (model / "report.html").exists():
            console.print(f"[dim]in the report: {model / 'report.html'}[/dim]")
    more = {"model": str(model), "environment": environment, "task": task, "seed": seed, "best_of": best_of}
    print_json(as_json, more | known.pop("tuned") | known)


def rows_of(tuned: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The rows of what was found, of the tuned policy and, if it was played, of the base."""
    rows = {"success rate": share(tuned), "mean return": returned(tuned), "mean length": f"{tuned['steps']:.0f} steps"}
    if base is not None:
        rows |= {"of the base": share(base), "its mean return": returned(base)}
    if "value" in tuned:
        rows["value at the start"] = f"{tuned['value']:.1f}, discounted return {tuned['discounted_return']:.1f}"
    if tuned.get("value_error") is not None:
        error = "" if tuned["value_error_error"] is None else f" ± {tuned['value_error_error']:.1f}"
        rows["less the return"] = (
            f"{tuned['value_error']:+.1f}{error}, of {tuned['episodes_with_known_return']} that were solved"
        )
    return rows


def share(found: Mapping[str, Any]) -> str:
    """A success rate with its interval."""
    low, high = found["success_rate_interval"]
    return f"{found['success_rate']:.1%} of {found['episodes']} episodes (95 %: {low:.1%} to {high:.1%})"


def returned(found: Mapping[str, Any]) -> str:
    """A mean return with its standard error."""
    return f"{found['return']:.1f}" + ("" if found["return_error"] is None else f" ± {found['return_error']:.1f}")
