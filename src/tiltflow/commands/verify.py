"""`tiltflow verify`: train a method on a problem with a known answer."""

from __future__ import annotations

from typing import Annotated

import typer

from tiltflow import plugins
from tiltflow.commands.terminal.console import make_console, print_json, print_table, spinner
from tiltflow.commands.terminal.options import AllowCode, Json, Quiet, Threads, completes, set_up_torch
from tiltflow.commands.terminal.progress import training_progress

METHODS = plugins.names("methods")
PROBLEMS = plugins.names("problems")
UTILITIES = plugins.names("utilities")
STEERING = plugins.names("steering")


def verify(
    problem: Annotated[
        str | None,
        typer.Argument(
            help=f"{', '.join(PROBLEMS)}; without it, these are listed.", autocompletion=completes(lambda: PROBLEMS)
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(METHODS)}.",
            show_default="the problem's",
            autocompletion=completes(lambda: METHODS),
        ),
    ] = None,
    utility: Annotated[
        str | None,
        typer.Option(
            help="Of the problem `utility`: short for --set utility.name=NAME.",
            show_default="superquantile",
            autocompletion=completes(lambda: UTILITIES),
        ),
    ] = None,
    steer: Annotated[
        str | None,
        typer.Option(
            help=f"Steer the base without training, in place of a method: {', '.join(STEERING)}, or a mapping with its name and"
            " settings.",
            autocompletion=completes(lambda: STEERING),
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            metavar="KEY=VALUE",
            help="Override a setting of the problem, the method or the run; may be repeated.",
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(min=1, help="Number of optimizer steps, of each stage if there are some.", show_default="the problem's"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the training and of all samples.", show_default="0")] = None,
    threads: Threads = None,
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train a method on a problem with a known answer, and measure its distance to that answer.

    --set changes settings of the problem, the method or the run, by name or dotted name.

    [dim]tiltflow verify mixture[/dim]
    [dim]tiltflow verify gaussian --set dimension=10 --set quadratic=3 --set beta=0.5[/dim]
    [dim]tiltflow verify mixture --set problem.scale=0.3 --set method.num_inference_steps=80 --iterations 1000[/dim]
    [dim]tiltflow verify mixture --method score-as-action --set sampling.solver=heun[/dim]
    [dim]tiltflow verify two-modes --method orw-cfm-w2 --set alpha=0.3[/dim]
    [dim]tiltflow verify utility --utility superquantile --set utility.share=0.1 --set alpha=5[/dim]
    [dim]tiltflow verify two-modes --steer best-of-n --set n=8[/dim]
    [dim]tiltflow verify lqg --set Q=1.3 --set q=0.7 --set lambda=0.5 --set T=2 --set K=0.2 --set k=-0.1 --set N=40[/dim]
    """
    from tiltflow.commands.terminal.verification import print_findings
    from tiltflow.errors import InputError
    from tiltflow.problems.verification.verify import read_verification
    from tiltflow.runs.staged.verification import steps
    from tiltflow.runs.staged.verification import verify as run_verification

    console = make_console(as_json)
    if problem is None:
        descriptions = {name: (plugins.find("problems", name).__doc__ or "").splitlines()[0] for name in PROBLEMS}
        print_table(console, descriptions, "problem")
        print_json(as_json, {"problems": descriptions})
        return
    if steer is not None:
        for option, value in (("--method", method), ("--utility", utility), ("--iterations", iterations)):
            if value is not None:
                raise InputError(
                    f"verify {problem}: {option} is for training, and --steer draws without; leave one of them out"
                )
        from tiltflow.problems.verification.steering import read_steered, verify_steering

        asked = read_steered(problem, steer, [*([] if seed is None else [f"seed={seed}"]), *(overrides or [])])
        set_up_torch("cpu", threads)
        with spinner(console, quiet, f"sampling {asked.num_samples}"):
            drawn = verify_steering(asked)
        print_findings(console, drawn)
        print_json(as_json, drawn.values)
        return
    if utility is not None and problem != "utility":
        raise InputError(
            f"verify {problem}: --utility belongs to the problem utility: tiltflow verify utility --utility {utility}"
        )
    given = {"iterations": iterations, "seed": seed, "utility.name": utility}
    extra = [f"{key}={value}" for key, value in given.items() if value is not None]
    settings = read_verification(problem, method, [*extra, *(overrides or [])])
    set_up_torch("cpu", threads)
    with training_progress(console, quiet, steps(settings)) as watch:
        found = run_verification(settings, watch)
    print_findings(console, found)
    print_json(as_json, found.values)
