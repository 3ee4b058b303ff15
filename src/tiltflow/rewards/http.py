"""A reward on another machine, or in another environment, over HTTP.

POST JSON {"images": [base64 of .png or .npy files], "prompts": [texts]}, answered by JSON {"rewards": [numbers]}, or by
{"error": text}. Nothing is ever unpickled. `tiltflow serve-reward` is such a server.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from tiltflow.data import to_pixels
from tiltflow.errors import InputError
from tiltflow.reward import OfPrompts, Reward
from tiltflow.settings import Settings

MOST_BYTES = 1 << 20  # of an answer


class Http(Settings):
    """Your server gets pictures and their prompts and returns a number for each, higher is better, in any unit."""

    differentiable: ClassVar[bool] = False
    unit: ClassVar[str] = "reward"

    name: Literal["http"] = "http"
    url: str
    """Such as http://127.0.0.1:8777/score."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Pictures in a request."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds to wait for an answer."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often to ask again, after 1, 2, 4 .. seconds, a server that does not answer or is busy (429, 5xx)."""
    format: Literal["png", "npy"] = "png"
    """png: rounded to 8 bits; npy: float32 [3, height, width] in [-1, 1]."""
    token_variable: str | None = None
    """The environment variable with the token that is sent as `Authorization: Bearer ..`; it is not written anywhere."""

    @field_validator("url")
    @classmethod
    def _http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"must begin with http:// or https://, got {url!r}")
        return url

    @property
    def description(self) -> str:
        return f"what the server at {self.url} says; higher is better"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Raises InputError if the token is asked for and not there."""
        headers = {"Content-Type": "application/json", "User-Agent": "tiltflow"}
        if self.token_variable is not None:
            if self.token_variable not in os.environ:
                raise InputError(f"reward.token_variable: the environment has no {self.token_variable}")
            headers["Authorization"] = f"Bearer {os.environ[self.token_variable]}"

        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            values: list[float] = []
            for i in range(0, len(images), self.batch_size):
                part = images[i : i + self.batch_size]
                body = {
                    "images": [base64.b64encode(file).decode() for file in files_of(part, self.format)],
                    "prompts": list(prompts[i : i + self.batch_size]),
                }
                values += rewards_in(self._ask(json.dumps(body).encode(), headers), len(part), self.url)
            return torch.tensor(values, dtype=torch.float32, device=images.device)

        return OfPrompts(score)

    def _ask(self, body: bytes, headers: dict[str, str]) -> bytes:
        """The answer. Raises InputError if there is none."""
        for attempt in range(self.retries + 1):
            try:
                request = urllib.request.Request(self.url, body, headers)
                began, answer = time.monotonic(), b""
                with urllib.request.build_opener(NoRedirect).open(request, timeout=self.timeout) as response:
                    while part := response.read1(1 << 16):
                        answer += part
                        if len(answer) > MOST_BYTES:
                            raise InputError(f"reward server {self.url}: its answer is longer than {MOST_BYTES} bytes")
                        if time.monotonic() - began > self.timeout:  # that of the socket begins anew with every byte
                            raise TimeoutError(f"its answer has not ended after {self.timeout:g} s")
                return answer
            except urllib.error.HTTPError as error:
                reason, final = f"{error.code} {error.reason}{_detail(error)}", error.code < 500 and error.code != 429
            except (urllib.error.URLError, OSError, ValueError) as error:
                reason, final = str(getattr(error, "reason", error)), False
            if final or attempt == self.retries:
                raise InputError(f"reward server {self.url}: {reason}, asked {attempt + 1} times")
            time.sleep(2**attempt)
        raise AssertionError("the last attempt returns or raises")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token is for the server of the recipe, and not for one that it points to."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


def files_of(images: Tensor, format: str) -> list[bytes]:
    """Images [batch, 3, height, width] in [-1, 1] as files."""
    files = []
    for image in images.detach().float().cpu():
        file = io.BytesIO()
        if format == "npy":
            np.save(file, image.numpy(), allow_pickle=False)
        else:
            pixels = to_pixels(image).permute(1, 2, 0).numpy()
            Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]).save(file, "PNG")
        files.append(file.getvalue())
    return files


def rewards_in(answer: bytes, count: int, url: str) -> list[float]:
    """The numbers of an answer. Raises InputError if it is anything else."""
    try:
        tree: Any = json.loads(answer)
    except (ValueError, RecursionError):
        raise InputError(f"reward server {url}: its answer is not JSON: {answer[:60]!r}") from None
    values = tree.get("rewards") if isinstance(tree, dict) else None
    if not isinstance(values, list) or len(values) != count or not all(map(is_finite, values)):
        raise InputError(f"reward server {url}: must answer {{'rewards': [{count} finite numbers]}}, got {str(tree)[:80]}")
    return [float(value) for value in values]


def is_finite(value: Any) -> bool:
    """Whether it is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _detail(error: urllib.error.HTTPError) -> str:
    """What a server says in {"error": ..}."""
    try:
        tree = json.loads(error.read(MOST_BYTES))
        return f" ({tree['error']})" if isinstance(tree, dict) and isinstance(tree.get("error"), str) else ""
    except (ValueError, OSError):
        return ""
