"""The server of the page, on 127.0.0.1 alone: pages by the key of what they show, and JSON at /api/.

How a further part adds to the page, without a line here:

(a) A route: a file `view/parts/my_part.py` with

        def routes(view: View) -> Mapping[str, Route]:
            def pairs(request: Request) -> Answer:
                run = view.place(request)  # of the key `at`: run.path is its folder; raises MissingError if there is none
                return {"count": 3}        # or File(data, "image/png")
            return {"GET my-part/pairs": pairs, "POST my-part/vote": vote}

    is asked for its routes once, when the server begins, so what it keeps (a model, a lock) lives in its closure. They are
    called from several threads. `request.query` has the query of the address, `request.body` the JSON of a POST. An InputError,
    and any other error of tiltflow, is answered as {"error": its line} with 400, a MissingError with 404.

(b) A section: a script `view/parts/my_part.js` beside it, wrapped in `(() => { .. })();`, is on every page that is served. It
    calls `tiltflow.section`, `tiltflow.key`, `tiltflow.get`, `tiltflow.post` and `tiltflow.on`; see the head of
    `reports/web/core.js`. Its style is of the classes of `reports/web/page.css`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tiltflow.errors import TiltflowError
from tiltflow.plugins import member, names
from tiltflow.rewards.serving.server import HOST, listening
from tiltflow.view import page
from tiltflow.view.request import Answer, File, MissingError, Request, Route, View

MOST_BYTES = 1 << 20  # of a request
API = "/api/"
POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'; script-src "
)


def make_server(view: View, port: int) -> ThreadingHTTPServer:
    """A server of the page on 127.0.0.1; `serve_forever` runs it. Port 0 takes any that is free. Raises InputError if the port
    is taken."""
    server = listening(handler(routes(view), view), port)
    server.daemon_threads = True
    return server


def routes(view: View) -> dict[str, Route]:
    """All routes, those of further parts too, by method and path."""
    found: dict[str, Route] = {
        "GET run": lambda request: page.run_data(view.place(request), after_of(request)),
        "GET place": lambda request: page.place_data(view.place(request)),
        "GET report": lambda request: {"html": page.report_of(view.place(request))},
    }
    for name in names("view.parts"):
        more: Mapping[str, Route] = member("view.parts", name, "routes")(view)
        found |= more
    return found


def after_of(request: Request) -> int:
    """The last step that the page knows."""
    text = request.query.get("after", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0


def handler(known: Mapping[str, Route], view: View) -> type[BaseHTTPRequestHandler]:
    """The class that answers requests."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def do_GET(self) -> None:
            self._answer("GET", None)

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            # a page of another site can send no JSON here without asking first, and nobody answers that
            if self.headers.get("Content-Type") != "application/json":
                return self._error(403, "not from this page")
            if not (length.isascii() and length.isdigit() and len(length) < 9 and int(length) <= MOST_BYTES):
                return self._error(400, f"a request has a Content-Length, of {MOST_BYTES} bytes at most")
            try:
                body = json.loads(self.rfile.read(int(length)))
            except (ValueError, RecursionError):
                return self._error(400, "a request is JSON")
            return self._answer("POST", body)

        def _answer(self, method: str, body: Any) -> None:
            """Find the route, and send what it answers."""
            if not self._is_ours():
                return self._error(403, "wrong host")
            address = urlsplit(self.path)
            request = Request(dict(parse_qsl(address.query)), body)
            try:
                if method == "GET" and address.path == "/":
                    return self._page(request)
                route = known.get(f"{method} {address.path.removeprefix(API)}") if address.path.startswith(API) else None
                if route is None:
                    return self._error(404, "there is no such page")
                self._send(200, route(request))
            except MissingError as error:
                self._error(404, str(error))
            except TiltflowError as error:
                self._error(400, str(error))
            except OSError:
                raise  # the browser has left
            except Exception:
                self._error(500, "tiltflow view could not answer; what went wrong is where it was started")
                raise

        def _page(self, request: Request) -> None:
            place = view.place(request)
            nonce = secrets.token_urlsafe(16)
            self._send(200, File(page.page_of(place, nonce).encode(), "text/html; charset=utf-8", nonce))

        def _is_ours(self) -> bool:
            """Whether the browser was led here by this address: any name of a site can be made to point here."""
            name, _, _ = self.headers.get("Host", "").rpartition(":")
            return name in (HOST, "localhost")

        def _error(self, code: int, text: str) -> None:
            self._send(code, {"error": text})

        def _send(self, code: int, answer: Answer) -> None:
            file = answer if isinstance(answer, File) else File(json.dumps(answer).encode(), "application/json")
            self.send_response(code)
            for key, value in {
                "Content-Type": file.kind,
                "Content-Length": str(len(file.data)),
                "Content-Security-Policy": POLICY + (f"'nonce-{file.nonce}'" if file.nonce else "'none'"),
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-store",
            }.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(file.data)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler
