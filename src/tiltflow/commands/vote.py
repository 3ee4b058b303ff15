"""`tiltflow vote`: ask people which of two pictures is better."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tiltflow.commands.terminal.console import escape, make_console, spinner
from tiltflow.commands.terminal.options import AcceptChanges, AllowCode, Device, NoiseSeed, Port, Threads, set_up_torch
from tiltflow.errors import InputError


def vote(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, a model folder, or a shipped model.")],
    against: Annotated[
        str,
        typer.Argument(
            help="What RUN is compared with: `before` it was tuned, `itself` sampled again, or another run or model."
        ),
    ] = "before",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the pictures and votes: new, or one in which to go on.")
    ] = Path("votes"),
    num_pairs: Annotated[int, typer.Option("--num-pairs", "-n", min=1, help="Number of pairs.")] = 100,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="Prompt for a pipeline; may be repeated.", show_default="those of the run's evaluation"),
    ] = None,
    port: Port = 8778,
    seed: NoiseSeed = 0,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
    accept_changes: AcceptChanges = False,
) -> None:
    """Serve a page on which people choose the better of two pictures; the reward `preference` learns from their votes.

    Nobody sees which picture is which. Listens on 127.0.0.1 only; stop it with Ctrl-C. The same command again goes on where it
    stopped, without sampling anything.

    [dim]tiltflow vote runs/even itself --output votes --num-pairs 200[/dim]
    """
    from tiltflow.api import load
    from tiltflow.files import check_output
    from tiltflow.rewards.serving.server import HOST, serve
    from tiltflow.rewards.serving.votes import PAIRS, Votes
    from tiltflow.rewards.serving.voting import make_page
    from tiltflow.runs.ballot import BEFORE, ITSELF, before_and_after, draw_pairs, prompts_of_run

    console = make_console(False)
    if (output / PAIRS).exists():
        votes = Votes.open(output)
    else:
        if output.exists():
            raise InputError(f"--output {output}: exists, and has no votes")
        chosen = set_up_torch(device, threads)
        model: Any
        other: Any = None
        if against == BEFORE:
            other, model = before_and_after(Path(run), chosen)
        else:
            model = load(run, chosen)
            other = None if against == ITSELF else load(against, chosen)
        names = ("after", "before") if against == BEFORE else (run, f"{run} again" if other is None else against)
        check_output(output)
        with spinner(console, False, f"sampling {num_pairs} pairs"):
            votes = draw_pairs(
                output, model, other, names, count=num_pairs, prompts=prompts or prompts_of_run(Path(run)), seed=seed
            )
    server = make_page(votes, port)
    console.print(
        f"vote at http://{HOST}:{server.server_address[1]}/; {len(votes.choices)} of {len(votes)} done; stop with Ctrl-C"
    )
    serve(server)
    console.print(f"{len(votes.choices)} votes in {escape(output)}: {escape(votes.words)}")
