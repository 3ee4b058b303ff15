"""`tiltflow verify-checkpoint`: check checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltflow.commands.terminal.console import escape, make_console, print_json
from tiltflow.commands.terminal.exit_codes import FAILURE
from tiltflow.commands.terminal.options import Json
from tiltflow.errors import CheckpointError, InputError


def verify_checkpoint(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a run, or of one of its checkpoints.")],
    as_json: Json = False,
) -> None:
    """Verify the checksums of checkpoints. Exit code 1 if one is damaged.

    [dim]tiltflow verify-checkpoint runs/even[/dim]
    """
    from tiltflow.runs import checkpoint

    inside = checkpoint.checkpoints(path / checkpoint.FOLDER)
    folders = [path] if (path / checkpoint.MANIFEST).exists() else inside or checkpoint.checkpoints(path)
    if not folders:
        raise InputError(f"{path}: is not a checkpoint, and has none in {checkpoint.FOLDER}/")
    console, found = make_console(as_json), dict[str, str | None]()
    for folder in folders:
        try:
            checkpoint.verify_checkpoint(folder)
            found[folder.name] = None
            console.print(f"[green]good[/green] {escape(folder.name)}")
        except CheckpointError as error:
            if not folder.exists():  # its run has written newer ones meanwhile
                console.print(f"[dim]gone[/dim] {escape(folder.name)}: deleted meanwhile")
                continue
            found[folder.name] = str(error)
            console.print(f"[red]bad[/red]  {escape(str(error))}")
    print_json(
        as_json,
        {"checkpoints": [{"name": name, "good": problem is None, "problem": problem} for name, problem in found.items()]},
    )
    if any(found.values()):
        raise typer.Exit(FAILURE)
