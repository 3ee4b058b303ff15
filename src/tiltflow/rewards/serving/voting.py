"""The page on which people vote, on 127.0.0.1 alone: two pictures of a prompt, without a word of which is which."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from tiltflow.errors import InputError
from tiltflow.rewards.serving.server import HOST, listening
from tiltflow.rewards.serving.votes import Choice, Votes

PAGE = Path(__file__).parent / "vote.html"
MOST_BYTES = 1000  # of a request
POLICY = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def make_page(votes: Votes, port: int) -> ThreadingHTTPServer:
    """A server of the page on 127.0.0.1; `serve_forever` runs it. Port 0 takes any that is free. Raises InputError if the port
    is taken."""
    return listening(handler(votes), port)


def state(votes: Votes) -> dict[str, Any]:
    """What the page shows: the pair that is next, and how many there are; the pictures are asked for by their side."""
    pair, total = len(votes.choices), len(votes)
    return {"pair": pair, "total": total, "prompt": votes.prompts[pair] if pair < total else ""}


def chosen(votes: Votes, pair: int, side: str) -> Choice:
    """The choice of whoever chose this side of a pair."""
    if side == "tie":
        return "tie"
    return "first" if (side == "left") == votes.first_is_left(pair) else "second"


def cast_vote(votes: Votes, asked: Any) -> bool:
    """Count a vote, {"pair": number, "side": "left", "right", "tie" or "undo"}. Returns False, and counts nothing, if it is not
    of the next pair: somebody voted in another window. Raises InputError for what is no vote."""
    try:
        pair, side = asked["pair"], asked["side"]
    except (TypeError, KeyError):
        raise InputError('a request is {"pair": number, "side": text}') from None
    following = len(votes.choices)
    if pair != following or side not in ("left", "right", "tie", "undo"):
        return False
    if side == "undo":
        votes.undo()
    elif following < len(votes):
        votes.vote(chosen(votes, following, side))
    return True


def picture(votes: Votes, pair: str, side: str) -> Path | None:
    """The file of the picture that is shown on this side of a pair, by its number; None if there is none."""
    if not (pair.isascii() and pair.isdigit() and len(pair) < 9 and int(pair) < len(votes) and side in ("left", "right")):
        return None
    return votes.picture(int(pair), 0 if (side == "left") == votes.first_is_left(int(pair)) else 1)


def handler(votes: Votes) -> type[BaseHTTPRequestHandler]:
    """The class that answers requests."""
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def do_GET(self) -> None:
            if not self._is_ours():
                return self._answer(403, {"error": "wrong host"})
            match self.path.split("/")[1:]:
                case [""]:
                    return self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
                case ["state"]:
                    with lock:
                        return self._answer(200, state(votes))
                case ["picture", pair, side] if path := picture(votes, pair, side):
                    return self._send(200, path.read_bytes(), "image/png")
            return self._answer(404, {"error": "there is no such page"})

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            # a page of another site can send no JSON here without asking first, and nobody answers that
            if self.path != "/vote" or not self._is_ours() or self.headers.get("Content-Type") != "application/json":
                return self._answer(403, {"error": "not from this page"})
            if not (length.isascii() and length.isdigit() and len(length) < 9 and int(length) <= MOST_BYTES):
                return self._answer(400, {"error": "a request is short"})
            try:
                tree = json.loads(self.rfile.read(int(length)))
                with lock:
                    counted = cast_vote(votes, tree)
                    return self._answer(200 if counted else 409, state(votes))  # the page goes on from here
            except (ValueError, RecursionError):
                return self._answer(400, {"error": "a request is JSON"})
            except InputError as error:
                return self._answer(400, {"error": str(error)})

        def _is_ours(self) -> bool:
            """Whether the browser was led here by this address: any name of a site can be made to point here."""
            name, _, _ = self.headers.get("Host", "").rpartition(":")
            return name in (HOST, "localhost")

        def _answer(self, code: int, tree: dict[str, Any]) -> None:
            self._send(code, json.dumps(tree).encode(), "application/json")

        def _send(self, code: int, body: bytes, kind: str) -> None:
            self.send_response(code)
            for key, value in {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Content-Security-Policy": POLICY,
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-store",
            }.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler
