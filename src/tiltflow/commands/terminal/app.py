"""The program `tiltflow`: finds the verbs, runs one, and turns its exceptions into one line and an exit code.

Each verb calls one function of the library. With TILTFLOW_TRACEBACK=1 in the environment, an error is printed with its
traceback.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from logging import getLogger
from typing import Annotated, Any

import typer
from rich.console import Console

from tiltflow import __version__, plugins
from tiltflow.commands.terminal.console import escape, is_main_process
from tiltflow.commands.terminal.exit_codes import CTRL_C, FAILURE, exit_code
from tiltflow.errors import InputError, Note, TiltflowError

ORDER = (
    *("train", "view", "sample", "evaluate", "export", "doctor", "advise", "sweep", "compare", "recipes", "settings"),
    *("verify", "pretrain", "vote", "serve-reward", "verify-checkpoint"),
)
"""Order of the verbs in --help; other verbs follow."""


def make_app() -> typer.Typer:
    """Make the app, with a verb for each file in `commands/`: the function of the file's name, with its docstring as help."""
    made = typer.Typer(
        name="tiltflow",
        help="Fine-tune flow-matching and diffusion models so that they sample [bold]p_base(x) exp(r(x) / beta)[/bold], "
        "and measure how close they come.\n\nStart with: [cyan]tiltflow train digits-even --output runs/even[/cyan]",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback(invoke_without_command=True)(print_version)
    for name in sorted(plugins.names("commands"), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        try:
            made.command(name)(plugins.member("commands", name, name.replace("-", "_")))
        except InputError as error:  # of another package: tiltflow's own verbs still work
            warnings.warn(str(error), Note, stacklevel=2)
    return made


def print_version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


app = make_app()


def main() -> None:
    """Run the command line; errors that a user can cause, and notes, are printed in one line each."""
    warnings.showwarning = partial(print_warning, warnings.showwarning)
    # transformers says so of each processor of pictures that diffusers imports, though none of them is used
    getLogger("transformers.utils.import_utils").addFilter(lambda record: "requires torchvision" not in record.getMessage())
    try:
        app()
    except TiltflowError as error:
        if os.environ.get("TILTFLOW_TRACEBACK"):
            traceback.print_exc()
        print_error(error)
        if "WORLD_SIZE" in os.environ:
            os._exit(exit_code(error))  # sys.exit would wait for the other processes, which may be waiting for this one
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(CTRL_C)
    except BrokenPipeError:
        sys.exit(FAILURE)


def print_error(error: TiltflowError) -> None:
    """Print an error in one line. Other processes wait first: if all have the error, the main process prints it and its exit
    stops them."""
    process = ""
    if not is_main_process():
        time.sleep(3)
        process = f" of process {os.environ['RANK']}"
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[red bold]error{process}:[/red bold] {escape(str(error))}")


def print_warning(otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Print a Note in one line; pass any other warning to `otherwise`."""
    if not issubclass(category, Note):
        otherwise(message, category, *where)
    elif is_main_process():
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[yellow]{escape(str(message))}[/yellow]")
