"""`tiltflow view`: look at runs in the browser, while they train too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltflow.commands.terminal.console import make_console
from tiltflow.commands.terminal.options import AcceptChanges, AllowCode, Device, Port, Threads, set_up_torch


def view(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs, sweeps, comparisons, stages, or folders of them.")
    ],
    port: Port = 8779,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
    accept_changes: AcceptChanges = False,
) -> None:
    """Serve a page on runs: curves that grow while they train, pictures before and after, tables.

    Several runs are drawn side by side. Listens on 127.0.0.1 only; stop it with Ctrl-C. A run's report.html is the same page in
    one file.

    [dim]tiltflow view runs/even runs/strokes[/dim]
    """
    import webbrowser

    from tiltflow.rewards.serving.server import HOST, serve
    from tiltflow.view.places import Places
    from tiltflow.view.request import View
    from tiltflow.view.server import make_server

    server = make_server(View(Places(runs), set_up_torch(device, threads)), port)
    address = f"http://{HOST}:{server.server_address[1]}/"
    make_console(False).print(f"{address}; stop with Ctrl-C")
    if browser:
        webbrowser.open(address)
    serve(server)
