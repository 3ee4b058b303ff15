"""`tiltflow verify`: train a method on a problem with a known answer."""

from __future__ import annotations

from typing import Annotated

import typer

from tiltflow import plugins
from tiltflow.commands.terminal.console import make_console, print_json, print_table
from tiltflow.commands.terminal.options import AllowCode, Json, Quiet, Set, Threads, completes, set_up_torch
from tiltflow.commands.terminal.progress import training_progress
from tiltflow.commands.terminal.verification import print_verification
from tiltflow.errors import InputError, did_you_mean

METHODS = plugins.names("methods")
PROBLEMS = ("gaussian", "lqg", "mixture", "two-modes")
"""A copy of the library's names: to import it takes seconds, which --help does not have. A test compares them."""


def verify(
    problem: Annotated[
        str | None,
        typer.Argument(help=f"{', '.join(PROBLEMS)}; leave it out for the list.", autocompletion=completes(lambda: PROBLEMS)),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(METHODS)}.",
            show_default="adjoint-matching; score-as-action for lqg",
            autocompletion=completes(lambda: METHODS),
        ),
    ] = None,
    overrides: Set = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", show_default="the problem's")] = None,
    seed: Annotated[int | None, typer.Option(min=0, show_default="0")] = None,
    threads: Threads = None,
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a method on a problem with a known answer, and measure its distance to that answer.

    Settings are those of the problem, the method and the run, by name or dotted name.

    [dim]tiltflow verify mixture[/dim]
    [dim]tiltflow verify gaussian --set dimension=10 --set quadratic=3 --set beta=0.5[/dim]
    [dim]tiltflow verify mixture --set problem.scale=0.3 --set method.num_inference_steps=80 --iterations 1000[/dim]
    [dim]tiltflow verify mixture --method score-as-action --set sampling.solver=heun[/dim]
    [dim]tiltflow verify two-modes --method orw-cfm-w2 --set alpha=0.3[/dim]
    [dim]tiltflow verify lqg --set Q=1.3 --set q=0.7 --set lambda=0.5 --set T=2 --set K=0.2 --set k=-0.1 --set N=40[/dim]
    """
    from tiltflow.problems.verify import PROBLEMS, read_verification, run_verification

    console = make_console(as_json)
    if problem is None:
        descriptions = {name: (part.__doc__ or "").splitlines()[0] for name, part in PROBLEMS.items()}
        print_table(console, descriptions, "problem")
        print_json(as_json, {"problems": descriptions})
        return
    if problem not in PROBLEMS:
        raise InputError(f"there is no problem {problem!r}{did_you_mean(problem, PROBLEMS)}")
    extra = [f"{key}={value}" for key, value in (("iterations", iterations), ("seed", seed)) if value is not None]
    method = method or ("score-as-action" if problem == "lqg" else "adjoint-matching")
    settings = read_verification(problem, method, [*(overrides or []), *extra])
    set_up_torch("cpu", threads)
    with training_progress(console, quiet, settings.iterations) as watch:
        result = run_verification(settings, watch)
    print_verification(console, result)
    print_json(as_json, result)
