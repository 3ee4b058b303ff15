"""`tiltflow settings`: list settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from tiltflow.commands.terminal.console import escape, make_console, print_json, print_table
from tiltflow.commands.terminal.options import Json, completes


def topic_names() -> Iterable[str]:
    """Return the names of everything that has settings."""
    from tiltflow.runs.describe import topics

    return topics()


def settings(
    topic: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="A method, reward, network, problem, or section of a recipe; without it, these are listed.",
            autocompletion=completes(topic_names),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the settings of a method, a reward, steering or a section of a recipe, with types, defaults and descriptions.

    [dim]tiltflow settings adjoint-matching[/dim]
    [dim]tiltflow settings class-log-odds[/dim]
    [dim]tiltflow settings training[/dim]
    """
    from dataclasses import asdict

    from rich.table import Table

    from tiltflow.runs.describe import settings_of, topics

    console = make_console(as_json)
    if topic is None:
        listed = {name: [title for title, _ in kinds] for name, kinds in topics().items()}
        print_table(console, {name: "; ".join(titles) for name, titles in listed.items()}, "settings of")
        print_json(as_json, {"topics": listed})
        return
    found = settings_of(topic)
    for title, (said, keys) in found.items():
        console.print(f"[bold]{escape(title)}[/bold]  {escape(said)}")
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("setting", "type", "default", ""):
            table.add_column(column, style="cyan" if column == "setting" else None, overflow="fold")
        for key in keys:
            table.add_row(*(escape(text) for text in (key.name, key.type, key.default, key.description)))
        console.print(table)
    print_json(
        as_json,
        {title: {"description": said, "settings": [asdict(key) for key in keys]} for title, (said, keys) in found.items()},
    )
