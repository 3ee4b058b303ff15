"""A reward on another machine, or in another environment, over HTTP.

POST JSON {"images": [base64 of .png or .npy files], "prompts": [texts]}, and "metadata": [mappings] where the prompts have any,
and "sources": [files like the images], the pictures that were edited, where the setting asks for them. The answer is JSON
{"rewards": [numbers]}, or {"error": text}. A picture that cannot be scored has null in place of a number.
Models without prompts send none. Nothing is unpickled. `tiltflow serve-reward` is such a server.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from tiltflow.data import to_pixels
from tiltflow.errors import SECRET, InputError, redacted, visible
from tiltflow.rewards import Metadata, Reward
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.rewards.functions.prompted import OfPrompts
from tiltflow.settings import Settings

MOST_BYTES = 1 << 20  # of an answer, at most
LONGEST_WAIT = 60.0  # seconds before a server is asked again, at most
VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Http(Settings):
    """Your server gets pictures and their prompts and returns a number for each, higher is better, in any unit."""

    differentiable: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "reward"

    name: Literal["http"] = "http"
    url: str
    """Such as http://127.0.0.1:8777/score. Secrets come from the environment: `https://host/score?key=${API_KEY}` or
    `https://user:${PASSWORD}@host/score`; files and messages of a run have the names of the variables alone."""
    batch_size: Annotated[int, Field(ge=1)] = 16
    """Pictures in a request."""
    timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds for an answer, from connecting to its last byte."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Retries of a request after 1, 2, 4 .. seconds, or as many as the server asks for (`Retry-After`), if there is no answer
    or a broken one, or if the server is busy (429, 5xx). Together they take (retries + 1) * timeout seconds at most."""
    format: Literal["png", "npy"] = "png"
    """png: rounded to 8 bits; npy: float32 [channels, height, width] in [-1, 1]."""
    sources: bool = False
    """Send the pictures that were edited too, of the size of the edits: for a server whose reward asks for `sources`."""
    token_variable: str | None = None
    """Environment variable with the token that is sent as `Authorization: Bearer ..`. The token is never written down."""

    @field_validator("url")
    @classmethod
    def _usable(cls, url: str) -> str:
        check_url(VARIABLE.sub("x", url), url)
        user, _, password = urlsplit(url).netloc.rpartition("@")[0].partition(":")
        if user and not VARIABLE.fullmatch(password or user):
            raise ValueError("a password does not belong in a recipe; write ${NAME}, and set NAME in the environment")
        for key, value in parse_qsl(urlsplit(url).query):
            if re.fullmatch(SECRET, key, re.IGNORECASE) and not VARIABLE.fullmatch(value):
                raise ValueError(
                    f"a secret does not belong in a recipe; write {key}=${{NAME}}, and set NAME in the environment"
                )
        return url

    @property
    def description(self) -> str:
        return f"what the server at {self.url} says; higher is better"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Raises InputError if the environment lacks the token, or another variable that the URL names."""
        headers = {"Content-Type": "application/json", "User-Agent": "tiltflow"}
        names = [*VARIABLE.findall(self.url), *([self.token_variable] if self.token_variable is not None else [])]
        for name in names:
            if not os.environ.get(name):
                raise InputError(f"reward http: the environment has no {name}")
        if self.token_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.token_variable]}"
        url = VARIABLE.sub(lambda match: quote(os.environ[match[1]], safe=""), self.url)
        if login := urlsplit(url).netloc.rpartition("@")[0]:
            headers["Authorization"] = f"Basic {base64.b64encode(unquote(login).encode()).decode()}"
            url = url.replace(f"{login}@", "", 1)
        if not all(value.isascii() and value.isprintable() for value in headers.values()):
            raise InputError(f"reward http: {self.token_variable} is no token, it has characters that a header cannot have")
        secrets = [os.environ[name] for name in names] + headers.get("Authorization", "").split()[1:]
        server = Server(f"reward server {self.url}", url, headers, self.timeout, self.retries, tuple(secrets))

        def score(
            images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], sources: Sequence[Tensor] = ()
        ) -> Tensor:
            values: list[float] = []
            for i in range(0, len(images), self.batch_size):
                these = slice(i, i + self.batch_size)
                part = images[these]
                body: dict[str, Any] = {"images": self._in_text(part), "prompts": list(prompts[these])}
                if any(metadata):
                    body["metadata"] = list(metadata[these])
                if len(sources):
                    body["sources"] = self._in_text(sources[these])
                values += rewards_in(server.ask(json.dumps(body, default=str).encode()), len(part), server)
            return torch.tensor(values, dtype=torch.float32, device=images.device)

        asks = ("prompts", "metadata", *(("sources",) if self.sources else ()))
        return OverHttp(of_frames(score), asks, request_size=self.batch_size)

    def _in_text(self, images: Iterable[Tensor]) -> list[str]:
        """Images as they are sent: files in base64."""
        return [base64.b64encode(file).decode() for file in files_of(images, self.format)]


@dataclass(frozen=True)
class OverHttp(OfPrompts):
    """A reward that gets the prompts, if there are any.

    Args:
        request_size: how many pictures are sent together.
    """

    request_size: int = 1

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) if self.prompts or "sources" in self.asks else self.score(x, prompts=(), metadata=())


class NoAnswerError(Exception):
    """There is no complete answer. It carries the message, and the seconds that the server asks to wait."""

    def __init__(self, message: str, wait: float = 0.0, final: bool = False):
        super().__init__(message)
        self.wait, self.final = wait, final


@dataclass(frozen=True)
class Server:
    """What answers requests.

    Args:
        name: how messages call it.
        url: where it is; secret, as are the headers.
        timeout: seconds for an answer.
        retries: how often it is asked again.
        secrets: what no message may repeat.
    """

    name: str
    url: str
    headers: Mapping[str, str]
    timeout: float
    retries: int
    secrets: tuple[str, ...]

    def ask(self, body: bytes) -> Any:
        """The JSON of the answer. Raises InputError, with the last reason, if there is none."""
        deadline = time.monotonic() + (self.retries + 1) * self.timeout
        for attempt in range(self.retries + 1):
            try:
                return self._in_time(body, min(self.timeout, deadline - time.monotonic()))
            except NoAnswerError as error:
                wait = min(max(2.0**attempt, error.wait), LONGEST_WAIT, (deadline - time.monotonic()) / 2)
                if error.final or attempt == self.retries or wait <= 0:
                    raise InputError(f"{self.name}: {self.shown(str(error))}, asked {attempt + 1} times") from None
            time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def shown(self, text: str) -> str:
        """The server's words without secrets, for a message."""
        for secret in self.secrets:
            text = text.replace(secret, "***").replace(quote(secret, safe=""), "***")
        return visible(text)[:400]

    def _in_time(self, body: bytes, seconds: float) -> Any:
        """`_once` with a limit on its time in all: the timeout of a socket begins anew with every byte."""
        answers: SimpleQueue[Any] = SimpleQueue()

        def ask() -> None:
            try:
                answers.put((self._once(body), None))
            except Exception as error:
                answers.put((None, error))

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer, error = answers.get(timeout=seconds)
        except Empty:
            raise NoAnswerError(f"no complete answer after {seconds:.3g} s") from None
        if error is not None:
            raise error
        return answer

    def _once(self, body: bytes) -> Any:
        try:
            request = urllib.request.Request(self.url, body, dict(self.headers))
            with urllib.request.build_opener(NoRedirect).open(request, timeout=self.timeout + 1) as response:
                answer = response.read(MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                said, final = f"{error.code} {error.reason}{_detail(error)}", error.code < 500 and error.code != 429
                raise NoAnswerError(said, seconds_in(error.headers.get("Retry-After", "")), final) from None
        except http.client.HTTPException as error:
            raise NoAnswerError(f"its answer is broken ({type(error).__name__})") from None
        except (OSError, ValueError) as error:
            raise NoAnswerError(str(getattr(error, "reason", error))) from None
        if len(answer) > MOST_BYTES:
            raise NoAnswerError(f"its answer is longer than {MOST_BYTES} bytes", final=True)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise NoAnswerError(f"its answer is not JSON: {answer[:60]!r}") from None


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: a token is for the server of the recipe alone."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


def check_url(url: str, name: str) -> None:
    """Raises ValueError, naming it as `name`, if it is no URL of a server."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"must begin with http:// or https://, got {redacted(name)!r}")
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname and parts.hostname.encode("idna")) and parts.port != 0
    except ValueError:  # a wrong port, unmatched brackets, a name that is too long
        usable = False
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"is no URL: {redacted(name)!r}")


def seconds_in(text: str) -> float:
    """The seconds of a header `Retry-After`, which may be a date.

    >>> seconds_in("7"), seconds_in("soon")
    (7.0, 0.0)
    """
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0


def files_of(images: Iterable[Tensor], format: str) -> list[bytes]:
    """Images [3, height, width] in [-1, 1] as files."""
    files = []
    for image in (each.detach().float().cpu() for each in images):
        file = io.BytesIO()
        if format == "npy":
            np.save(file, image.numpy(), allow_pickle=False)
        else:
            pixels = to_pixels(image).permute(1, 2, 0).numpy()
            Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0]).save(file, "PNG")
        files.append(file.getvalue())
    return files


def rewards_in(tree: Any, count: int, server: Server) -> list[float]:
    """The numbers of an answer, NaN for null. Raises InputError if it is anything else."""
    values = tree.get("rewards") if isinstance(tree, dict) else None
    if not isinstance(values, list) or len(values) != count or not all(map(is_number_or_null, values)):
        raise InputError(
            f"{server.name}: must answer {{'rewards': [{count} numbers or null]}}, got {server.shown(str(tree))[:80]}"
        )
    return [math.nan if value is None else to_float(value) for value in values]


def is_number_or_null(value: Any) -> bool:
    """True for numbers and null; JSON's true and false are neither."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def to_float(value: float) -> float:
    """Infinite, if it is an integer that no float can hold."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _detail(error: urllib.error.HTTPError) -> str:
    """The text of {"error": ..} in an answer."""
    try:
        tree = json.loads(error.read(MOST_BYTES))
        return f" ({tree['error']})" if isinstance(tree, dict) and isinstance(tree.get("error"), str) else ""
    except (ValueError, OSError, RecursionError, http.client.HTTPException):
        return ""
