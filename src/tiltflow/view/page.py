"""Pages of what is shown: of a run its report, live; of all else a table of runs, their curves, and the report of one."""

# Mutation tests: none: words and pages

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiltflow.errors import InputError
from tiltflow.evaluation.monitor import read_looks
from tiltflow.files import read_json
from tiltflow.plugins import names
from tiltflow.reports.description import MOST_POINTS, describe
from tiltflow.reports.report import TEMPLATES, article, read_page, render
from tiltflow.settings import read_yaml
from tiltflow.training.records import known_records
from tiltflow.view.places import Place, runs_of

PARTS = Path(__file__).parent / "parts"


def page_of(place: Place) -> str:
    """The page of a place."""
    runs = [run_data(run) for run in runs_of(place)]
    data = {"runs": runs, "shown": place.key if place.kind == "run" else None}
    page = read_page(place.path, summary_of(place))
    return render("run.html.j2", place.name, data, scripts(), page=page, version=page.said("tiltflow"))


def scripts() -> list[str]:
    """The scripts of a page that is served: of its growth, and of further parts."""
    further = [PARTS / f"{name.replace('-', '_')}.js" for name in names("view.parts")]
    return [path.read_text(encoding="utf-8") for path in (TEMPLATES / "live.js", *further) if path.exists()]


def report_of(place: Place) -> str:
    """What is said of a run, without the page around it."""
    return article("run.html.j2", page=read_page(place.path, summary_of(place)))


def run_data(run: Place, after: int = 0) -> dict[str, Any]:
    """What the scripts draw of a run: what `describe` says, its key and state, and `stamp`, which changes when its report does.

    Args:
        after: the last step that is known there; `from` of the answer is the same, or 0 if the curves are all there are.
    """
    records, looks, state = known_records(run.path)[0], read_looks(run.path), run.state
    start = after if records and records[-1]["step"] >= after else 0
    live = state in ("training", "waiting")
    said = describe(
        summary_of(run), records, looks, name=run.name, most_points=None if live or after else MOST_POINTS, after=start
    )
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
