"""Rewards over HTTP: the client and the server against each other, and against everything that can go wrong between them."""

from __future__ import annotations

import base64
import http.client
import io
import json
import pickle
import socketserver
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from servers import replying, served_by_command, serving
from tiny import tiny_recipe
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.errors import InputError, NonFiniteError
from tiltflow.pictures import IMAGE, picture_of
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.checked import evaluate
from tiltflow.rewards.functions.prompted import OfPrompts, given, told
from tiltflow.rewards.http import Http
from tiltflow.rewards.named_colour import NamedColour
from tiltflow.rewards.serving.request import BadRequestError, read_request
from tiltflow.rewards.serving.server import make_server
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import evaluate_run, run
from tiltflow.settings import read_yaml, validate
from tiltflow.streams import stream

WAIT = time.sleep
PROMPTS = ["red", "a green cat", "blue", "teal", "black"]


@contextmanager
def answering(*answers: tuple[int, bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives these answers, the last one for ever, and what it was asked."""
    asked: list[bytes] = []

    def reply(path: str, body: bytes) -> tuple[int, bytes]:
        asked.append(body)
        return answers[min(len(asked), len(answers)) - 1]

    with replying(reply) as url:
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


@pytest.mark.parametrize("format", ["npy", "png"])
def test_pictures_that_were_edited_go_over_the_wire(format: Any) -> None:
    """To a reward that asks for them, in three requests: each edit is compared with its own source."""
    reward = OfPrompts(lambda images, sources: -(images - sources).square().mean((1, 2, 3)), ("sources",))
    whole = (pictures() * 127.5 - 0.5).round() / 127.5 + 0.5 / 127.5  # what 8 bits hold
    sources = [picture_of(part, "x") for part in -whole.flip(0)]
    items = [Item(text, {IMAGE: source}) for text, source in zip(PROMPTS, sources, strict=True)]
    with serving(make_server(reward, 0)) as url:
        over = Http(url=url, format=format, sources=True, batch_size=2).build()
        assert torch.allclose(told(over, items)(whole), told(reward, items)(whole), atol=1e-5)
        with pytest.raises(InputError, match="asks for sources"):
            told(Http(url=url).build(), items)(whole)
        with pytest.raises(InputError, match=r"asks for sources, the pictures that were edited; this model edits none"):
            given(over, PROMPTS)(whole)
        with pytest.raises(InputError, match=r"asks for prompts and metadata and sources, and there are 0"):
            over(whole)


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
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "must answer"),
        (b'{"rewards": [1]}', "2 numbers"),
        (b'{"rewards": ["1", "2"]}', "2 numbers"),
        (b'{"rewards": [true, false]}', "2 numbers"),
        (b'{"rewards": [[1], [2]]}', "2 numbers"),
        (b'{"rewards": {"0": 1, "1": 2}}', "2 numbers"),
        (b"1" * (2 << 20), "is longer than"),
    ],
)
def test_garbage_is_refused_in_one_line(answer: bytes, message: str) -> None:
    with answering((200, answer)) as (url, _), pytest.raises(InputError, match=message) as caught:
        ask(url, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["null", "NaN", "1e999", "-Infinity", "1" + "0" * 400, "1e39"])
def test_a_picture_without_a_number_is_named(value: str) -> None:
    """So that `non_finite_rewards: drop` can leave it out."""
    with answering((200, f'{{"rewards": [1, {value}, 3]}}'.encode())) as (url, _):
        reward = given(Http(url=url).build(), PROMPTS[:3])
        with pytest.raises(NonFiniteError) as caught:
            evaluate(reward, pictures(3))
    assert caught.value.where["samples"] == [1]
    assert caught.value.where["prompts"] == [PROMPTS[1]]


def test_the_server_says_null_for_what_is_no_number() -> None:
    def reward(x: Tensor) -> Tensor:
        value = x.mean((1, 2, 3)).clone()
        value[2] = torch.nan
        value[0] = torch.inf
        return value

    with serving(make_server(reward, 0)) as url, pytest.raises(NonFiniteError) as caught:
        evaluate(given(Http(url=url).build(), PROMPTS), pictures())
    assert caught.value.where["samples"] == [0, 2]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", ["png", "npy"])
def test_a_model_without_prompts(channels: int, format: Any) -> None:
    """Its pictures arrive as they are, in grey too, and no prompts are sent."""

    def reward(x: Tensor) -> Tensor:
        assert x.shape[1:] == (channels, 6, 7)
        return x.mean((1, 2, 3))

    x = pictures()[:, :channels]
    with serving(make_server(reward, 0)) as url:
        assert (Http(url=url, format=format).build()(x) - reward(x)).abs().max() < 0.01
    with answering((200, b'{"rewards": [1, 2, 3, 4, 5]}')) as (url, asked):
        Http(url=url, format=format).build()(x)
    assert json.loads(asked[0])["prompts"] == []


GOOD = b'{"rewards": [1, 2.5]}'
BROKEN = {
    "cut headers": b"HTTP/1.1 200 OK\r\nContent-Le",
    "a short body": b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n" + GOOD[:9],
    "broken chunks": b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"re',
    "odd chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no status": b"hello\r\n\r\n",
    "an odd status": b"HTTP/1.1 two hundred\r\n\r\n",
    "an endless header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    "nothing": b"",
    "broken JSON": b"HTTP/1.1 200 OK\r\n\r\n[",
    "deep JSON": b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000,
}


@contextmanager
def raw_answers(*answers: bytes | Callable[[Any], None]) -> Iterator[str]:
    """A server that sends these bytes, whatever it is asked, or does what a function does with the connection."""
    left = list(answers)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            length = 0
            while (line := self.rfile.readline().strip()) != b"":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            self.rfile.read(length)
            answer = left.pop(0) if len(left) > 1 else left[0]
            with suppress(OSError):
                answer(self) if callable(answer) else self.wfile.write(answer)

    class Raw(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close = True, False

    with serving(Raw(("127.0.0.1", 0), Handler)) as url:
        yield url


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_asked_for_again(name: str) -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)
    with raw_answers(BROKEN[name], BROKEN[name], whole) as url:
        assert ask(url, 2).tolist() == [1, 2.5]
    with raw_answers(BROKEN[name]) as url, pytest.raises(InputError, match=r"asked 2 times$") as caught:
        ask(url, 2, retries=1)
    assert "\n" not in str(caught.value)


def test_the_server_says_when_to_ask_again(no_waiting: list[float]) -> None:
    later = (datetime.now(UTC) + timedelta(seconds=30)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    busy = [b"HTTP/1.1 429 Busy\r\nRetry-After: %s\r\n\r\n" % wait.encode() for wait in ("7", later, "999999999", "soon", "²")]
    with raw_answers(*busy, b"HTTP/1.1 200 OK\r\n\r\n" + GOOD) as url:
        assert ask(url, 2, retries=8).tolist() == [1, 2.5]
    assert no_waiting[0] == 7
    assert 25 < no_waiting[1] <= 30
    assert no_waiting[2:] == [60, 8, 16]  # it is believed for a minute, and no text for anything


def drip_headers(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(200):
        handler.wfile.write(b"X-%d: y\r\n" % i)
        time.sleep(0.05)


def drip_body(handler: Any) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize("answer", [drip_headers, drip_body, lambda handler: time.sleep(9)], ids=["headers", "body", "nothing"])
def test_an_answer_is_there_in_time_or_not_at_all(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it drips, and retries and the waits between them included."""
    monkeypatch.setattr("tiltflow.rewards.http.time.sleep", WAIT)
    with raw_answers(answer) as url:
        began = time.monotonic()
        with pytest.raises(InputError, match=r"no complete answer after [\d.]+ s, asked [23] times"):
            ask(url, 2, timeout=0.3, retries=2)
        assert 0.5 < time.monotonic() - began < 1.5


def test_a_server_that_is_not_there() -> None:
    with answering((200, b"")) as (url, _):
        pass
    with pytest.raises(InputError, match="refused, asked 3 times"):
        ask(url, retries=2)


def test_a_redirect_is_not_followed() -> None:
    """It would take the token along."""
    with answering((200, b'{"rewards": [1, 2]}')) as (other, asked_there):
        moved = b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % other.encode()
        with raw_answers(moved) as url, pytest.raises(InputError, match="302 Found, asked 1 times"):
            ask(url, 2)
        assert asked_there == []


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://x", "localhost:8777", "http://", "http:///score", "http://:80/", "http://a:b/", "http://a:0/",
        "http://a:99999/", "http://[::1/", "http://a b/", "http://a/b c", "http://a/\n", "http://a/\x1b[31m", "http://ä.de/ü",
        "http://" + "a" * 300 + "/", "http://a..b/", "",
    ],
)  # fmt: skip
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(InputError, match=r"^r: url: (is no URL|must begin with http)") as caught:
        validate(Http, {"url": url}, "r")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "url",
    ["http://me:s3cret@h/", "http://s3cret@h/", "http://${ME}:s3cret@h/", "https://h/?key=s3cret", "https://h/a?b=1&api_key=s3cret",
     "https://h/?access_token=s3cret&x=${X}", "https://h/?sig=s3cret", "https://h/?password=s3cret${X}"],
)  # fmt: skip
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InputError, match=r"a (password|secret) does not belong in a recipe; write .*\$\{NAME\}") as caught:
        validate(Http, {"url": url}, "r")
    assert "s3cret" not in str(caught.value)


def test_a_secret_comes_from_the_environment_and_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "s3&cr?t /")
    monkeypatch.setenv("PASSWORD", "p@ss:w/rd")
    seen: list[tuple[str, str]] = []

    class Echo(BaseHTTPRequestHandler):
        """Repeats what it was asked, as careless servers do in their errors."""

        def do_POST(self) -> None:
            seen.append((self.path, self.headers.get("Authorization", "")))
            body = json.dumps({"error": f"no {self.path} for {self.headers.get('Authorization')}, s3&cr?t /"}).encode()
            self.send_response(404, "none of s3%26cr%3Ft%20%2F")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Echo)) as url:
        settings = Http(url=url.replace("http://", "http://me:${PASSWORD}@") + "?key=${KEY}&model=a")
        with pytest.raises(InputError, match="404") as caught:
            settings.build()(pictures(1))
    assert seen == [("/score?key=s3%26cr%3Ft%20%2F&model=a", "Basic " + base64.b64encode(b"me:p@ss:w/rd").decode())]
    for text in (str(caught.value), settings.description, settings.model_dump_json(), repr(settings)):
        for secret in ("s3", "p@ss", seen[0][1].split()[1]):
            assert secret not in text
    monkeypatch.delenv("KEY")
    with pytest.raises(InputError, match="the environment has no KEY"):
        settings.build()


def test_what_a_server_says_is_shown_and_not_obeyed() -> None:
    said = json.dumps({"error": "\x1b[2J\n\u202egone"}).encode()
    with answering((400, said)) as (url, _), pytest.raises(InputError) as caught:
        ask(url, 2)
    assert "\\x1b[2J\\n\\u202egone" in str(caught.value)
    assert str(caught.value).isprintable()


# ---- the server, asked badly ----


def png(mode: str = "RGB") -> str:
    file = io.BytesIO()
    from PIL import Image

    Image.new(mode, (4, 4)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def npy_header(text: str) -> str:
    """A .npy file that has this header, and nothing after it."""
    content = text.encode()
    return base64.b64encode(b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content).decode()


def npy(array: Any, allow_pickle: bool = False) -> str:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\x80\x04", "not JSON"),
        (b"[]", "must be"),
        (b"[" * 100_000, "not JSON"),
        ({"images": [], "prompts": []}, "at least one"),
        ({"images": "x"}, "must be"),
        ({"images": ["x"], "prompts": ["a", "b"]}, "as many"),
        ({"images": [1], "prompts": ["a"]}, "must be texts"),
        ({"images": ["***"], "prompts": ["a"]}, "image 0: is not base64"),
        ({"images": [base64.b64encode(b"GIF89a").decode()], "prompts": ["a"]}, "cannot be read"),
        ({"images": [npy(np.zeros((3, 4, 4)))], "prompts": ["a"]}, "must be float32"),
        ({"images": [npy(np.zeros((4, 4), np.float32))], "prompts": ["a"]}, "must be float32"),
        ({"images": [npy(np.zeros((2, 4, 4), np.float32))], "prompts": ["a"]}, "must be float32"),
        ({"images": [npy(np.zeros((3, 0, 4), np.float32))], "prompts": ["a"]}, "must be float32"),
        ({"images": [npy(np.array([{}]), allow_pickle=True)], "prompts": ["a"]}, "must be float32"),
        ({"images": [npy_header("(" * 900)]}, "image 0: cannot be read"),
        ({"images": [npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4, 4), 'x': 1}")]}, "cannot be read"),
        ({"images": [npy_header("{'descr': [('a', '<f4')], 'fortran_order': 0, 'shape': (3,)}")]}, "cannot be read"),
        ({"images": [npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4, 4)}")]}, "cannot be read"),
        ({"images": [npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3, -4, 4)}")]}, "must be float32"),
        ({"images": [npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 10**9, 4)}")]}, "cannot be read"),
        ({"images": [npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 100000, 100000)}")]}, "pixels at most"),
        ({"images": [base64.b64encode(b"\x93NUMPY\x09\x09\xff\xff").decode()]}, "cannot be read"),
        ({"images": [png(), npy(np.zeros((3, 5, 5), np.float32))], "prompts": ["a", "b"]}, "of one size"),
        ({"images": [png()], "prompts": ["a"], "sources": [npy(np.zeros((3, 5, 5), np.float32))]}, "of one size"),
        ({"images": [png()], "prompts": ["a"], "sources": [png(), png()]}, "as many as prompts"),
        ({"images": [png()], "sources": [png()]}, "as many as prompts"),
        ({"images": [png("L")], "prompts": ["a"], "sources": [png("L")]}, "in colour"),
    ],
)
def test_requests_that_are_refused(body: Any, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        read_request(body if isinstance(body, bytes) else json.dumps(body).encode())


def raw(url: str, method: str, path: str, body: bytes | None, headers: dict[str, Any]) -> int:
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
        assert raw(url, "POST", "/score", None, {"Content-Length": "9" * 5000}) == 413
        for length in ("²", "-1", "1e3", "", " "):
            assert raw(url, "POST", "/score", None, {"Content-Length": length.encode("latin-1")}) == 400
        assert raw(url, "POST", "/score", b"[" * 100_000, {}) == 400
        assert raw(url, "POST", "/score", json.dumps({"images": [npy_header("(" * 900)]}).encode(), {}) == 400
        assert raw(url, "POST", "/score", json.dumps({"images": [png()], "prompts": ["no colour"]}).encode(), {}) == 400
        assert raw(url, "POST", "/score", good, {}) == 200


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from /proc")
def test_pictures_are_counted_before_they_are_unpacked() -> None:
    """Twelve of 4096 x 4096, less than a megabyte as files, would take gigabytes."""
    code = """
import base64, io, json, re, sys
from PIL import Image
from tiltflow.rewards.serving.request import BadRequestError, read_request
file = io.BytesIO()
Image.new("L", (4096, 4096)).save(file, "PNG")
body = json.dumps({"images": [base64.b64encode(file.getvalue()).decode()] * 12}).encode()
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
try:
    read_request(body)
except BadRequestError as error:
    print(json.dumps({"body": len(body), "error": str(error), "megabytes": (peak() - before) / 1024}))
"""
    found = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert found["body"] < 1e6
    assert found["error"] == "12 images of 4096 x 4096: a request has 16777216 pixels at most"
    assert found["megabytes"] < 20


def test_it_listens_on_this_machine_alone() -> None:
    server = make_server(NamedColour().build(), 0)
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(InputError, match="--port"):
        make_server(NamedColour().build(), server.server_address[1])
    server.server_close()


def test_the_command_serves_a_reward_until_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "reward.yaml").write_text("reward: named-colour\n")
    found = list[Tensor]()
    result = served_by_command(
        ["serve-reward", str(tmp_path / "reward.yaml"), "--device", "cpu"],
        lambda root: found.append(ask(f"{root}/score", format="npy")),
    )
    assert result.exit_code == 0, result.output
    assert "named-colour at http://127.0.0.1:" in result.output
    assert torch.allclose(found[0], given(NamedColour().build(), PROMPTS)(pictures()), atol=1e-6)


def test_a_run_keeps_the_name_of_a_secret_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image model, without prompts, and a reward whose URL has a key: trained, gone on with, measured; no file has it."""
    monkeypatch.setenv("REWARD_KEY", "s3cret&key")
    seen = set()

    def bright(path: str, body: bytes) -> tuple[int, bytes]:
        seen.add(path)
        return 200, json.dumps({"rewards": [sum(image.encode()) for image in json.loads(body)["images"]]}).encode()

    with replying(bright) as url:
        reward = {"name": "http", "url": url + "?key=${REWARD_KEY}", "batch_size": 8}
        method = {"name": "orw-cfm-w2", "num_inference_steps": 3, "min_effective_sample_size": 1}
        training = {"max_train_steps": 1, "train_batch_size": 8}
        tree = {"method": method, "optimizer": {"lr_scheduler": "constant"}, "training": training}
        path = tiny_recipe(tmp_path, reward=reward, **tree, evaluation={"num_samples": 16})
        run(validate(Recipe, read_yaml(path), "recipe"), tmp_path / "run")
        kept = read_yaml(tmp_path / "run" / "recipe.yaml")
        assert kept["reward"]["url"] == url + "?key=${REWARD_KEY}"
        kept["training"] |= {"max_train_steps": 2, "resume_from_checkpoint": "latest"}
        run(validate(Recipe, kept, "recipe"), tmp_path / "run")
        evaluate_run(tmp_path / "run", num_samples=8)
    assert seen == {"/score?key=s3cret%26key"}
    assert [row["step"] for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())] == [1, 2]
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        assert b"s3cret" not in file.read_bytes(), file
