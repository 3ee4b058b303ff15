"""Writing the report of a run: one self-contained HTML page on how close the run came to its target law.

It is made from the files of the run folder alone: `page.py` computes its values, `web/run.html.j2` has its text. The page of
`tiltflow view` is the same: its scripts and style are in `web/` too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tiltflow.evaluation.monitor import read_looks
from tiltflow.files import final_name, read_json, trusted, write_text
from tiltflow.reports.episodes import tasks_of
from tiltflow.reports.page import SIDES, Page, page_of
from tiltflow.training.records import known_records

TEMPLATES = Path(__file__).parent / "web"
SCRIPTS = ("core", "table", "curves", "pairs", "molecules")
"""Scripts of a page, in their order."""


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, from the files there, and return its path.

    Raises InputError if summary.json cannot be read; any other file may be missing.
    """
    source = folder / "summary.json"
    summary = read_json(source)
    with trusted(source):
        page = read_page(folder, summary)
        runs = [{**page.drawn, "key": page.title, "state": "finished"}]
        text = render("run.html.j2", page.title, {"runs": runs, "shown": page.title}, page=page, version=page.said("tiltflow"))
    path = folder / "report.html"
    write_text(path, text)
    return path


def read_page(folder: Path, summary: Mapping[str, Any]) -> Page:
    """Compute the values of a run's page from its folder; any file may be missing.

    Args:
        summary: content of summary.json, or what is known before there is one.
    """
    pictures, videos, molecules = ([folder / f"{side}.{kind}" for side in SIDES] for kind in ("png", "gif", "xyz"))
    recipe = folder / "recipe.yaml"
    return page_of(
        summary,
        known_records(folder)[0],
        looks=read_looks(folder),
        pictures=[path.read_bytes() for path in pictures if path.exists()],
        videos=[path.read_bytes() for path in videos if path.exists()],
        molecules=[path.read_text(encoding="utf-8", errors="replace") for path in molecules if path.exists()],
        tasks=tasks_of(folder, summary),
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else "",
        folder=final_name(folder),
    )


def render(part: str, title: str, data: Mapping[str, Any], scripts: Sequence[str] = (), nonce: str = "", **values: Any) -> str:
    """Render a page as HTML; every value is escaped.

    Args:
        part: template of what is between its head and its end.
        data: what the scripts draw, as JSON.
        scripts: texts of more scripts, of a page that is served; without them the page is a file of its own, and is allowed to
            load nothing.
        nonce: an attribute of all scripts, of a page that is served.
    """
    texts = [*((TEMPLATES / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS), *scripts]
    return (
        environment()
        .get_template("shell.html.j2")
        .render(part=part, title=title, data=in_script(data), scripts=texts, live=bool(scripts), nonce=nonce, **values)
    )


def article(part: str, **values: Any) -> str:
    """Render a template without the page around it."""
    return environment().get_template(part).render(**values)


def in_script(data: Mapping[str, Any]) -> Markup:
    """Write JSON as the text of a <script>, which nothing in it ends."""
    return Markup(json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False).replace("<", "\\u003c"))


@cache
def environment() -> Environment:
    """The templates, compiled once."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
