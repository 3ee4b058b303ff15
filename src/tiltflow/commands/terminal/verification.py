"""Printing of the result of `tiltflow verify`."""

from __future__ import annotations

from rich.console import Console

from tiltflow.commands.terminal.console import escape, print_table
from tiltflow.problems import Check, Findings, Table


def print_findings(console: Console, found: Findings) -> None:
    """Print the tables of a problem's checks."""
    for table in found.tables:
        if table.columns:
            print_columns(console, table)
        else:
            print_table(console, {name: str(cell) for name, cell in table.rows.items()}, table.title)


def print_columns(console: Console, table: Table) -> None:
    """Print a table of several columns."""
    from rich.table import Table as Grid

    grid = Grid(box=None, header_style="bold", pad_edge=False)
    grid.add_column(escape(table.title), style="cyan", no_wrap=True)
    for column in table.columns:
        grid.add_column(column, no_wrap=True)
    for name, cells in table.rows.items():
        grid.add_row(escape(name), *(escape(cell) for cell in ([cells] if isinstance(cells, (Check, str)) else cells)))
    console.print(grid)
