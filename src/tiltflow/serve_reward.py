"""A server for reward `http`: any reward of a recipe, on this machine's own address alone."""

from __future__ import annotations

import base64
import binascii
import hmac
import io
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pydantic import BeforeValidator
from torch import Tensor

from tiltflow.errors import InputError, NonFiniteError
from tiltflow.plugins import part_of
from tiltflow.reward import Reward, evaluate, given
from tiltflow.settings import Settings

HOST = "127.0.0.1"
MOST_BYTES = 1 << 28  # of a request
MOST_PIXELS = 1 << 24  # of a picture


class Served(Settings):
    """What is served."""

    reward: Annotated[Any, BeforeValidator(part_of("rewards"))]


class BadRequestError(Exception):
    """The request is not what it should be."""


def make_server(reward: Reward, port: int, *, token: str | None = None, device: str = "cpu") -> ThreadingHTTPServer:
    """A server of POST /score on 127.0.0.1; `serve_forever` runs it. Port 0 takes any that is free.

    Args:
        token: what requests must bring as `Authorization: Bearer ..`, if anything.

    Raises InputError if the port is taken.
    """
    lock = Lock()  # one batch at a time: the reward may hold a network

    def score(body: bytes) -> list[float]:
        images, prompts = read_request(body)
        try:
            with lock, torch.no_grad():
                values: list[float] = evaluate(given(reward, prompts), images.to(device)).tolist()
        except (InputError, NonFiniteError, RuntimeError) as error:
            raise BadRequestError(str(error).splitlines()[0]) from None
        return values

    try:
        return ThreadingHTTPServer((HOST, port), handler(score, token))
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}") from None


def handler(score: Callable[[bytes], list[float]], token: str | None) -> type[BaseHTTPRequestHandler]:
    """The class that answers requests."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def do_POST(self) -> None:
            if self.path != "/score":
                return self._answer(404, {"error": "there is only /score"})
            if token is not None and not hmac.compare_digest(
                self.headers.get("Authorization", "").encode(), f"Bearer {token}".encode()
            ):
                return self._answer(401, {"error": "the token is missing or wrong"})
            length = self.headers.get("Content-Length", "")
            if not length.isdigit() or int(length) > MOST_BYTES:
                return self._answer(413, {"error": f"a request has a length, of {MOST_BYTES} bytes at most"})
            try:
                return self._answer(200, {"rewards": score(self.rfile.read(int(length)))})
            except BadRequestError as error:
                return self._answer(400, {"error": str(error)})

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


def read_request(body: bytes) -> tuple[Tensor, list[str]]:
    """Images [batch, 3, height, width] in [-1, 1] and their prompts. Raises BadRequestError if they are anything else."""
    try:
        tree = json.loads(body)
    except ValueError:
        raise BadRequestError("the request is not JSON") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("images"), list) or not isinstance(tree.get("prompts"), list):
        raise BadRequestError('the request must be {"images": [..], "prompts": [..]}')
    images, prompts = tree["images"], tree["prompts"]
    if not images or len(images) != len(prompts) or not all(isinstance(part, str) for part in (*images, *prompts)):
        raise BadRequestError("images and prompts must be texts, as many of the one as of the other, at least one")
    pictures = [read_image(text, i) for i, text in enumerate(images)]
    if len({picture.shape for picture in pictures}) > 1:
        raise BadRequestError("the images of a request must be of one size")
    return torch.stack(pictures), prompts


def read_image(text: str, number: int) -> Tensor:
    """[3, height, width] in [-1, 1], of the base64 of a .png or .npy file."""
    try:
        file = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequestError(f"image {number}: is not base64") from None
    try:
        if file.startswith(b"\x93NUMPY"):
            array = np.load(io.BytesIO(file), allow_pickle=False)
            if array.dtype != np.float32 or array.ndim != 3 or array.shape[0] != 3 or array.size > 3 * MOST_PIXELS:
                raise BadRequestError(f"image {number}: must be float32 [3, height, width], got {array.dtype} {array.shape}")
            return torch.from_numpy(array)
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise BadRequestError(f"image {number}: has more than {MOST_PIXELS} pixels")
            pixels = torch.from_numpy(np.asarray(image.convert("RGB")).copy())
            return pixels.permute(2, 0, 1).float() / 127.5 - 1
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, EOFError) as error:
        raise BadRequestError(f"image {number}: cannot be read ({error})") from None
