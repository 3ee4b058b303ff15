"""The page on which people vote, on 127.0.0.1 alone: two pictures of a prompt, without a word of which is which."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

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
                case ["picture", pair, "left" | "right" as side] if pair.isascii() and pair.isdigit() and len(pair) < 9:
                    if int(pair) < len(votes):
                        first = (side == "left") == votes.first_is_left(int(pair))
                        return self._send(200, votes.picture(int(pair), 0 if first else 1).read_bytes(), "image/png")
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
                pair, side = tree["pair"], tree["side"]
            except (ValueError, TypeError, KeyError, RecursionError):
                return self._answer(400, {"error": 'a request is {"pair": number, "side": text}'})
            with lock:
                if pair != len(votes.choices) or side not in ("left", "right", "tie", "undo"):
                    return self._answer(409, state(votes))  # voted in another window: the page goes on from here
                if side == "undo":
                    votes.undo()
                elif pair < len(votes):
                    votes.vote(chosen(votes, pair, side))
                return self._answer(200, state(votes))

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
