"""Pages of what is shown: of a run its report, live; of all else a table of runs, their curves, and the report of one."""

# Mutation tests: none: words and pages

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup

from tiltflow.errors import InputError
from tiltflow.evaluation.monitor import read_looks
from tiltflow.evaluation.played import FOLDER as EPISODES
from tiltflow.files import read_json, trusted
from tiltflow.plugins import names
from tiltflow.reports.comparison import comparison_values
from tiltflow.reports.description import MOST_POINTS, describe
from tiltflow.reports.overview import Shown, overview
from tiltflow.reports.page import Page
from tiltflow.reports.report import TEMPLATES, article, read_page, render
from tiltflow.reports.stages import stages_values
from tiltflow.reports.swept import swept
from tiltflow.reports.tables import Cell
from tiltflow.runs.sweep import collect, points_of
from tiltflow.settings import read_yaml
from tiltflow.training.records import known_records
from tiltflow.view.growing import growing
from tiltflow.view.places import Place, in_work, runs_of, within

PARTS = Path(__file__).parent / "parts"
IN_WORDS = {"training": "is being trained", "waiting": "begins", "stopped": "was stopped", "finished": "is finished"}


def page_of(place: Place, nonce: str) -> str:
    """The page of a place.

    Args:
        nonce: the word by which the server's policy knows the scripts of the page from any that a run might bring.
    """
    runs = runs_of(place)
    data = {"runs": [run_data(run) for run in runs], "shown": place.key, "kind": place.kind, "stamp": stamp_of(place)}
    part, values = said_of(place)
    return render(part, place.name, data, scripts(), nonce, **values)


def report_of(place: Place) -> str:
    """What is said of a place, without the page around it."""
    part, values = said_of(place)
    return article(part, **values)


def said_of(place: Place) -> tuple[str, dict[str, Any]]:
    """The template of a place, and what it says."""
    if place.kind == "run":
        page = run_page(place)
        return "run.html.j2", {"page": page, "version": page.said("tiltflow")}
    others = [each for each in within(place) if each.kind != "run"]
    return "place.html.j2", {
        "body": body_of(place),
        "headline": ", ".join(each.name for each in place.named) or place.name,
        "others": [[Cell(each.name, href=address(each)), Cell(each.kind)] for each in others],
        **overview([shown(run) for run in runs_of(place)]),
    }


def body_of(place: Place) -> str:
    """What is said of a sweep, a comparison or stages; empty for a folder, and as long as there is nothing."""
    try:
        match place.kind:
            case "sweep":
                content = sweep_content(place)
                with trusted(place.path / "sweep.json", "the same `tiltflow sweep` writes it again"):
                    return Markup(article("sweep.html.j2", **swept(content, place.name)))
            case "comparison":
                return Markup(article("comparison.html.j2", **comparison_values(place.path)))
            case "stages":
                link = lambda name: address(Place(f"{place.key}/{name}", place.path / name, "run"))  # noqa: E731
                return Markup(article("stages.html.j2", **stages_values(place.path, link)))
    except InputError as error:
        return Markup("<header><h1>{}</h1><p class='note'>{}</p></header>").format(place.name, error)
    return ""


def sweep_content(place: Place) -> dict[str, Any]:
    """The content of sweep.json, which is written when a sweep ends; before, the same of what is done."""
    if not in_work(place.path):
        return read_json(place.path / "sweep.json")
    plan = read_yaml(place.path / "sweep.yaml")
    with trusted(place.path / "sweep.yaml", "the same `tiltflow sweep` writes it again"):
        return collect(points_of(plan["recipe"], plan["over"], "sweep"), place.path, {})


def shown(run: Place) -> Shown:
    """A run among others."""
    picture, drawn = run.path / "after.png", run_data(run)
    return Shown(
        run.name, run.key, address(run), run.state, summary_of(run), drawn, picture.read_bytes() if picture.exists() else None
    )


def run_page(run: Place) -> Page:
    """The values of a run's page; while there is no summary, of what is known."""
    page = read_page(run.path, summary_of(run))
    if (run.path / "summary.json").exists():
        return page
    steps = page.drawn["axes"]["step"]
    return replace(
        page, headline=f"{run.name} {IN_WORDS[run.state]}, {steps[-1] if steps else 0} iterations so far", commands={}
    )


def address(place: Place) -> str:
    """The address of the page of a place."""
    return "/?" + urlencode({"at": place.key})


def place_data(place: Place) -> dict[str, Any]:
    """The runs of a place and their states, and `stamp`, which changes when what is said of it does."""
    runs = [{"key": run.key, "state": run.state} for run in runs_of(place)]
    return {"runs": runs, "stamp": stamp_of(place)}


def stamp_of(place: Place) -> str:
    """Changes when what is said of a place does, the training of its runs apart."""
    files = [time_of(place.path / name) for name in ("sweep.json", "comparison.json", "stages.json", EPISODES)]
    return str([files, in_work(place.path), [each.key for each in within(place)] if place.kind != "run" else []])


def scripts() -> list[str]:
    """The scripts of a page that is served: of its growth, and of further parts."""
    further = [PARTS / f"{name.replace('-', '_')}.js" for name in names("view.parts")]
    return [path.read_text(encoding="utf-8") for path in (TEMPLATES / "live.js", *further) if path.exists()]


def run_data(run: Place, after: int = 0) -> dict[str, Any]:
    """What the scripts draw of a run: what `describe` says, its key and state, and `stamp`, which changes when its report does.

    Args:
        after: the last step that is known there; `from` of the answer is the same, or 0 if the curves are all there are.
    """
    looks, state = read_looks(run.path), run.state
    most = None if after or state in ("training", "waiting") else MOST_POINTS
    grown = growing(run.path).after(after) if after else None
    start = 0 if grown is None else after
    records, keys = (known_records(run.path)[0], None) if grown is None else grown
    said = describe(summary_of(run), records, looks, name=run.name, most_points=most, after=start, keys=keys)
    stamp = [state, len(looks), sorted(said["curves"]), time_of(run.path / "summary.json")]
    return {**said, "key": run.key, "state": state, "from": start, "stamp": str(stamp)}


def time_of(path: Path) -> int:
    """When a file was written, in nanoseconds; 0 if there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def summary_of(run: Place) -> dict[str, Any]:
    """The summary of a run; before there is one, what its recipe says."""
    try:
        return read_json(run.path / "summary.json")
    except InputError:
        pass
    try:
        recipe = read_yaml(run.path / "recipe.yaml")
    except InputError:
        recipe = {}
    method = recipe.get("method")
    known = {
        "name": run.name,
        "description": recipe.get("description"),
        "model": recipe.get("model"),
        "seed": recipe.get("seed"),
    }
    known |= {"method": method.get("name"), "beta": method.get("beta")} if isinstance(method, dict) else {}
    return {key: value for key, value in known.items() if isinstance(value, str | int | float)}
