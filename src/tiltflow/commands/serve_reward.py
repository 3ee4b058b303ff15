"""`tiltflow serve-reward`: serve a reward over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tiltflow.commands.terminal.console import escape, make_console
from tiltflow.commands.terminal.options import AllowCode, Device, Port, Set, Threads, set_up_torch
from tiltflow.errors import InputError


def serve_reward(
    recipe: Annotated[Path, typer.Argument(help="A .yaml file with `reward:`, such as a training recipe.")],
    overrides: Set = None,
    port: Port = 8777,
    token_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the token that requests must have.", show_default="none")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    allow_code: AllowCode = False,
) -> None:
    """Serve a reward to other processes of this machine, for the reward `http`. Listens on 127.0.0.1 only; stop it with Ctrl-C.

    [dim]tiltflow serve-reward pick-score.yaml --port 8777[/dim]
    [dim]tiltflow train mine.yaml --output runs/mine --set 'reward={name: http, url: "http://127.0.0.1:8777/score"}'[/dim]
    """
    from tiltflow.rewards.functions.latents import seen_by
    from tiltflow.rewards.serving.server import HOST, Served, make_server, serve
    from tiltflow.settings import apply_overrides, read_yaml, validate

    tree = apply_overrides(read_yaml(recipe), overrides or [])
    settings = validate(Served, {key: value for key, value in tree.items() if key == "reward"}, str(recipe))
    if token_variable is not None and token_variable not in os.environ:
        raise InputError(f"--token-variable: environment variable {token_variable} is not set")
    chosen = set_up_torch(device, threads)
    token = os.environ[token_variable] if token_variable else None
    reward = settings.reward.build(chosen)
    if "latents" in seen_by(reward):
        raise InputError(
            f"reward {settings.reward.name}: looks at latents, and pictures are what is sent; name it in the recipe"
        )
    server = make_server(reward, port, token=token, device=chosen)
    make_console(False).print(
        f"{escape(settings.reward.name)} at http://{HOST}:{server.server_address[1]}/score; stop with Ctrl-C"
    )
    serve(server)
