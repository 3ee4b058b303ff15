"""Blind rating on the page: which of two pictures is better, before or after tuning; votes lie in the folder of the run."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import copy_context
from pathlib import Path
from threading import Lock
from typing import Annotated, Any

from pydantic import Field

from tiltflow.rewards.serving import voting
from tiltflow.rewards.serving.votes import PAIRS, Votes
from tiltflow.runs.ballot import BEFORE, before_and_after, draw_pairs, prompts_of_run
from tiltflow.settings import Settings, validate
from tiltflow.user_code import refused
from tiltflow.view.request import Answer, File, MissingError, Request, Route, View

FOLDER = "votes"
"""In the folder of a run: `tiltflow vote RUN --output RUN/votes` goes on with the same votes."""


class Asked(Settings):
    """What the page asks for before the first vote."""

    num_pairs: Annotated[int, Field(ge=1, le=1000)] = 50
    """Number of pairs that are drawn."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of their noise, and of the side on which each is shown."""


def state(votes: Votes | None) -> dict[str, Any]:
    """What the page shows: the next pair, and what people chose so far."""
    if votes is None:
        return {"pair": 0, "total": 0, "prompt": "", "words": ""}
    return {**voting.state(votes), "words": votes.words}


def opened(run: Path) -> Votes | None:
    """The votes of a run; None if there are none yet. Raises InputError if they cannot be read."""
    return Votes.open(run / FOLDER) if (run / FOLDER / PAIRS).is_file() else None


def begin(run: Path, asked: Asked, device: str) -> Votes:
    """The votes of a run: those that are there, or new pairs of it before and after. Raises InputError for a run that has no
    pictures or whose models cannot be had."""
    if (known := opened(run)) is not None:
        return known
    with refused(f"{run}: cannot be sampled"):
        base, tuned = before_and_after(run, device)
        names, prompts = ("after", BEFORE), prompts_of_run(run)
        return draw_pairs(run / FOLDER, tuned, base, names, count=asked.num_pairs, prompts=prompts, seed=asked.seed)


def routes(view: View) -> Mapping[str, Route]:
    """The routes of this part; requests wait for one another."""
    lock, consent = Lock(), copy_context()  # threads that answer requests do not have the consent of the user

    def votes_of(request: Request) -> Votes:
        found = opened(view.place(request).path)
        if found is None:
            raise MissingError("there are no pairs yet")
        return found

    def show(request: Request) -> Answer:
        with lock:
            return state(opened(view.place(request).path))

    def start(request: Request) -> Answer:
        run, asked = view.place(request).path, validate(Asked, request.settings, "rate")
        with lock:
            return state(consent.run(begin, run, asked, view.device))

    def vote(request: Request) -> Answer:
        with lock:
            votes = votes_of(request)
            voting.cast_vote(votes, request.body)  # one of another pair counts nothing, and the page goes on from here
            return state(votes)

    def picture(request: Request) -> Answer:
        path = voting.picture(votes_of(request), request.query.get("pair", ""), request.query.get("side", ""))
        if path is None:
            raise MissingError("there is no such picture")
        return File(path.read_bytes(), "image/png")

    return {"GET rating/state": show, "POST rating/begin": start, "POST rating/vote": vote, "GET rating/picture": picture}
