"""Servers for tests: one that answers as told, and commands that serve until Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from tiltflow.commands.terminal.app import app


@contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[str]:
    """The URL of a server that runs meanwhile."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def replying(reply: Callable[[str, bytes], tuple[int, bytes]]) -> Iterator[str]:
    """A server that answers what is posted by a function (path, body) -> (status, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            code, body = reply(self.path, self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


def served_by_command(arguments: list[str], visit: Callable[[str], None]) -> Result:
    """Run a command that serves, visit it at its root as soon as it is there, and press Ctrl-C."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ended, failed = threading.Event(), list[BaseException]()

    def visitor() -> None:
        while not ended.is_set():
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
        try:
            if not ended.is_set():
                visit(f"http://127.0.0.1:{port}")
        except BaseException as error:
            failed.append(error)
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=visitor, daemon=True)
    thread.start()
    result = CliRunner().invoke(app, [*arguments, "--port", str(port)])
    ended.set()
    thread.join()
    if failed:
        raise failed[0]
    return result
