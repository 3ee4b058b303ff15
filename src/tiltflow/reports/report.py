"""Writing the report of a run: one self-contained HTML page on how close the run came to its target law.

It is made from the files of the run folder alone: `page.py` computes its values, `page.html.j2` has its text, `page.css` its
style.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tiltflow.evaluation.monitor import read_looks
from tiltflow.files import final_name, read_json, trusted, write_text
from tiltflow.reports.page import SIDES, Page, page_of
from tiltflow.training.records import known_records

TEMPLATES = Path(__file__).parent


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, from the files there, and return its path.

    Raises InputError if summary.json cannot be read; any other file may be missing.
    """
    pictures, videos, molecules = ([folder / f"{side}.{kind}" for side in SIDES] for kind in ("png", "gif", "xyz"))
    recipe = folder / "recipe.yaml"
    source = folder / "summary.json"
    summary = read_json(source)
    with trusted(source):
        text = render(
            page_of(
                summary,
                known_records(folder)[0],
                looks=read_looks(folder),
                pictures=[path.read_bytes() for path in pictures if path.exists()],
                videos=[path.read_bytes() for path in videos if path.exists()],
                molecules=[path.read_text(encoding="utf-8", errors="replace") for path in molecules if path.exists()],
                recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.exists() else "",
                folder=final_name(folder),
            )
        )
    path = folder / "report.html"
    write_text(path, text)
    return path


def render(page: Page) -> str:
    """Render the page as HTML; every value is escaped."""
    return environment().get_template("page.html.j2").render(page=page)


@cache
def environment() -> Environment:
    """The templates, compiled once."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
