"""Printing: with --json, one JSON object on standard output and all else on standard error. Only the main process prints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import markup
from rich.console import Console

from tiltflow.errors import redacted, visible


def escape(text: object) -> str:
    """Make text of a user or a file safe to print: without markup, control characters and passwords. Always use it for such
    text."""
    return markup.escape(visible(redacted(str(text))))


def is_main_process() -> bool:
    """Return whether this is the main process (rank 0)."""
    return os.environ.get("RANK", "0") == "0"


def make_console(as_json: bool) -> Console:
    """Make the console for people; it prints only in the main process."""
    return Console(stderr=as_json, highlight=False, quiet=not is_main_process())


def print_json(as_json: bool, result: Mapping[str, Any]) -> None:
    """Print the result of a command as JSON, if --json is set."""
    if as_json and is_main_process():
        print(json.dumps(result))


def print_table(console: Console, rows: Mapping[str, str], title: str) -> None:
    """Print names and texts in two columns; `title` is the head of the first."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(title, no_wrap=True, style="cyan")
    table.add_column("")
    for key, text in rows.items():
        table.add_row(escape(key), escape(text))
    console.print(table)


@contextmanager
def spinner(console: Console, quiet: bool, text: str) -> Iterator[None]:
    """Show a spinner with a text in this context."""
    if quiet:
        yield
        return
    with console.status(text):
        yield
