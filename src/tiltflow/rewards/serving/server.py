"""A server for reward `http`: any reward of a recipe, on 127.0.0.1 alone."""

from __future__ import annotations

import hmac
import json
import math
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

import torch

from tiltflow.errors import InputError, NonFiniteError, UserCodeError, visible
from tiltflow.rewards import NamedReward, Reward
from tiltflow.rewards.functions.checked import evaluate
from tiltflow.rewards.functions.prompted import given
from tiltflow.rewards.serving.request import BadRequestError, read_request
from tiltflow.settings import Settings

HOST = "127.0.0.1"
MOST_BYTES = 1 << 28  # of a request


class Served(Settings):
    """The reward that is served."""

    reward: NamedReward


def make_server(reward: Reward, port: int, *, token: str | None = None, device: str = "cpu") -> ThreadingHTTPServer:
    """A server of POST /score on 127.0.0.1; `serve_forever` runs it. Port 0 takes any that is free.

    Args:
        token: if given, requests must bring it as `Authorization: Bearer ..`.

    Raises InputError if the port is taken.
    """
    lock = Lock()  # one batch at a time: the reward may hold a network, and pictures may be large

    def score(body: bytes) -> list[float | None]:
        with lock:
            images, prompts, metadata = read_request(body)
            try:
                with torch.no_grad():
                    values = evaluate(given(reward, prompts, metadata) if prompts else reward, images.to(device))
            except NonFiniteError as error:
                values = error.tensors["rewards"]  # the client decides what to do with the others
            except (InputError, UserCodeError, RuntimeError) as error:
                raise BadRequestError(str(error)) from None
        return [value if math.isfinite(value) else None for value in values.tolist()]

    return listening(handler(score, token), port)


def listening(handler: type[BaseHTTPRequestHandler], port: int) -> ThreadingHTTPServer:
    """A server on 127.0.0.1. Port 0 takes any that is free. Raises InputError if the port is taken."""
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}") from None


def serve(server: ThreadingHTTPServer) -> None:
    """Answer until Ctrl-C."""
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


def handler(score: Callable[[bytes], list[float | None]], token: str | None) -> type[BaseHTTPRequestHandler]:
    """The class that answers requests."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def do_POST(self) -> None:
            if self.path != "/score":
                return self._answer(404, {"error": "there is only /score"})
            if token is not None and not hmac.compare_digest(
                self.headers.get("Authorization", "").encode("utf-8", "replace"), f"Bearer {token}".encode()
            ):
                return self._answer(401, {"error": "the token is missing or wrong"})
            length = self.headers.get("Content-Length", "")
            if not (length.isascii() and length.isdigit()):
                return self._answer(400, {"error": "a request has a Content-Length"})
            if len(length) > 12 or int(length) > MOST_BYTES:
                return self._answer(413, {"error": f"a request has {MOST_BYTES} bytes at most"})
            try:
                return self._answer(200, {"rewards": score(self.rfile.read(int(length)))})
            except BadRequestError as error:
                return self._answer(400, {"error": visible(str(error).splitlines()[0])[:400]})

        def _answer(self, code: int, tree: dict[str, Any]) -> None:
            body = json.dumps(tree).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler
