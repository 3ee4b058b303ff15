"""What routes of the page get and give: requests, answers, and the runs that are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tiltflow.errors import InputError
from tiltflow.view.places import Place, Places


class MissingError(Exception):
    """There is no such page, or run."""


@dataclass(frozen=True)
class Request:
    """A request.

    Args:
        query: what follows the question mark of the address.
        body: the JSON of a POST; None of a GET.
    """

    query: Mapping[str, str] = field(default_factory=dict)
    body: Any = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """The body of a POST, as settings. Raises InputError for another."""
        if not isinstance(self.body, dict):
            raise InputError(f"the body of a request must be a mapping of settings, is {type(self.body).__name__}")
        return self.body


@dataclass(frozen=True)
class File:
    """An answer that is not JSON, such as a picture: its bytes, their media type, and of a page the word without which its
    scripts are not run."""

    data: bytes
    kind: str
    nonce: str = ""


Answer = Mapping[str, Any] | File
"""JSON, or a file."""
Route = Callable[[Request], Answer]


@dataclass(frozen=True)
class View:
    """What is shown.

    Args:
        device: of models that are sampled.
    """

    places: Places
    device: str = "cpu"

    def place(self, request: Request) -> Place:
        """The run, sweep, .. whose key is `at` in the request. Raises MissingError if there is none."""
        found = self.places.find(request.query.get("at", ""))
        if found is None:
            raise MissingError(f"{request.query.get('at', '')}: is not there any more, or is no run")
        return found
