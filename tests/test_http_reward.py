"""Rewards over HTTP: the client and the server against each other, and against everything that can go wrong between them."""

from __future__ import annotations

import base64
import http.client
import io
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.reward import Reward, given
from tiltflow.rewards.http import Http
from tiltflow.rewards.named_colour import NamedColour
from tiltflow.serve_reward import BadRequestError, make_server, read_request
from tiltflow.streams import stream

PROMPTS = ["red", "a green cat", "blue", "teal", "black"]


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/score"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def answering(*answers: tuple[int, bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives these answers, the last one for ever, and what it was asked."""
    asked: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            code, body = answers[min(len(asked), len(answers)) - 1]
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, asked


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr("tiltflow.rewards.http.time.sleep", waits.append)
    return waits


def pictures(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 6, 7, generator=stream(0, "pictures")) * 2 - 1


def ask(url: str, count: int = 5, **settings: Any) -> Tensor:
    reward: Reward = given(Http(url=url, **settings).build(), PROMPTS[:count])
    return reward(pictures(count))


@pytest.mark.parametrize(("format", "off"), [("npy", 1e-6), ("png", 0.01)])
def test_the_reward_is_the_same_over_the_wire(format: Any, off: float) -> None:
    reward = NamedColour().build()
    expected = given(reward, PROMPTS)(pictures())
    with serving(make_server(reward, 0)) as url:
        found = ask(url, format=format, batch_size=2)
    assert (found - expected).abs().max() < off


def test_a_token_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIGHT", "secret")
    monkeypatch.setenv("WRONG", "guess")
    with serving(make_server(NamedColour().build(), 0, token="secret")) as url:
        assert len(ask(url, token_variable="RIGHT")) == 5
        for settings in ({}, {"token_variable": "WRONG"}):
            with pytest.raises(InputError, match=r"401 .*\(the token is missing or wrong\), asked 1 times"):
                ask(url, **settings)
    with pytest.raises(InputError, match="the environment has no NOWHERE"):
        ask(url, token_variable="NOWHERE")


def test_a_busy_server_is_asked_again(no_waiting: list[float]) -> None:
    good = json.dumps({"rewards": [1, 2.5]}).encode()
    with answering((503, b""), (429, b""), (200, good)) as (url, asked):
        assert ask(url, 2).tolist() == [1, 2.5]
    assert len(asked) == 3
    assert no_waiting == [1, 2]


def test_a_request_in_parts() -> None:
    with answering((200, b'{"rewards": [1, 1]}'), (200, b'{"rewards": [1, 1]}'), (200, b'{"rewards": [1]}')) as (url, asked):
        assert len(ask(url, batch_size=2)) == 5
    assert [len(json.loads(body)["images"]) for body in asked] == [2, 2, 1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>garbage", "is not JSON"),
        (b"", "is not JSON"),
        (pickle.dumps([1.0, 2.0]), "is not JSON"),
        (b"[1, 2]", "must answer"),
        (b'{"rewards": [1]}', "2 finite numbers"),
        (b'{"rewards": [1, NaN]}', "2 finite numbers"),
        (b'{"rewards": [1, 1e999]}', "2 finite numbers"),
        (b'{"rewards": ["1", "2"]}', "2 finite numbers"),
        (b'{"rewards": [true, false]}', "2 finite numbers"),
        (b"1" * (2 << 20), "is longer than"),
    ],
)
def test_garbage_is_refused_in_one_line(answer: bytes, message: str) -> None:
    with answering((200, answer)) as (url, _), pytest.raises(InputError, match=message) as caught:
        ask(url, 2)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there() -> None:
    with answering((200, b"")) as (url, _):
        pass
    with pytest.raises(InputError, match="refused, asked 3 times"):
        ask(url, retries=2)


def test_a_redirect_is_not_followed() -> None:
    """It would take the token along."""
    with answering((200, b'{"rewards": [1, 2]}')) as (other, asked_there):

        class Elsewhere(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.send_response(302)
                self.send_header("Location", other)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        with serving(ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)) as url, pytest.raises(InputError, match="302 Found"):
            ask(url, 2)
        assert asked_there == []


def test_a_server_that_says_nothing_is_left_after_the_timeout() -> None:
    release = threading.Event()

    class Silent(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            release.wait(5)

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Silent)) as url:
        with pytest.raises(InputError, match="timed out, asked 1 times"):
            ask(url, retries=0, timeout=0.2)
        release.set()


def test_urls() -> None:
    for url in ("file:///etc/passwd", "ftp://x", "localhost:8777"):
        with pytest.raises(ValueError, match="must begin with http"):
            Http(url=url)


# ---- the server, asked badly ----


def png() -> str:
    file = io.BytesIO()
    from PIL import Image

    Image.new("RGB", (4, 4)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def npy(array: Any, allow_pickle: bool = False) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\x80\x04", "not JSON"),
        (b"[]", "must be"),
        ({"images": [], "prompts": []}, "at least one"),
        ({"images": ["x"], "prompts": []}, "as many"),
        ({"images": [1], "prompts": ["a"]}, "must be texts"),
        ({"images": ["***"], "prompts": ["a"]}, "image 0: is not base64"),
        ({"images": [base64.b64encode(b"GIF89a").decode()], "prompts": ["a"]}, "cannot be read"),
        ({"images": [npy(np.zeros((3, 4, 4)))], "prompts": ["a"]}, "must be float32"),
        ({"images": [npy(np.zeros((4, 4), np.float32))], "prompts": ["a"]}, "must be float32"),
        ({"images": [npy(np.array([{}]), allow_pickle=True)], "prompts": ["a"]}, "cannot be read"),
        ({"images": [png(), npy(np.zeros((3, 5, 5), np.float32))], "prompts": ["a", "b"]}, "of one size"),
    ],
)
def test_requests_that_are_refused(body: Any, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        read_request(body if isinstance(body, bytes) else json.dumps(body).encode())


def raw(url: str, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=5)
    connection.request(method, path, body, headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_the_server_answers_what_is_wrong_and_lives_on() -> None:
    reward: Callable[[Tensor], Tensor] = NamedColour().build()
    good = json.dumps({"images": [png()], "prompts": ["red"]}).encode()
    with serving(make_server(reward, 0)) as url:
        assert raw(url, "GET", "/score", None, {}) == 501
        assert raw(url, "POST", "/other", good, {}) == 404
        assert raw(url, "POST", "/score", b"{", {}) == 400
        assert raw(url, "POST", "/score", None, {"Content-Length": "9" * 20}) == 413
        assert raw(url, "POST", "/score", json.dumps({"images": [png()], "prompts": ["no colour"]}).encode(), {}) == 400
        assert raw(url, "POST", "/score", good, {}) == 200


def test_it_listens_on_this_machine_alone() -> None:
    server = make_server(NamedColour().build(), 0)
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(InputError, match="--port"):
        make_server(NamedColour().build(), server.server_address[1])
    server.server_close()
