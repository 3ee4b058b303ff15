"""`tiltflow recipes`: list or print the recipes that ship with tiltflow."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tiltflow.commands.terminal.console import make_console, print_json, print_table
from tiltflow.commands.terminal.options import Json
from tiltflow.errors import InputError, did_you_mean


def recipes(
    name: Annotated[str | None, typer.Argument(help="Name of the recipe to print.")] = None,
    as_json: Json = False,
) -> None:
    """List the recipes that ship with tiltflow, or print one as a start for your own.

    [dim]tiltflow recipes digits-even > mine.yaml[/dim]
    """
    from tiltflow.runs.recipe import shipped_recipes
    from tiltflow.settings import read_yaml

    files = {**shipped_recipes("train"), **shipped_recipes("pretrain")}
    if name is not None:
        if name not in files:
            raise InputError(f"there is no recipe {name!r}{did_you_mean(name, files)}")
        sys.stdout.write(files[name].read_text(encoding="utf-8"))
        return
    console = make_console(as_json)
    entries = [
        {"name": key, "command": path.parent.name, "description": read_yaml(path).get("description", "")}
        for key, path in files.items()
    ]
    print_table(console, {f"{entry['command']} {entry['name']}": entry["description"] for entry in entries}, "recipe")
    print_json(as_json, {"recipes": entries})
