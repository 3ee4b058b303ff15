"""Writing the report of stages: one HTML page, a row and a picture for each stage, from the files of their folder alone."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.files import final_name, read_json, trusted, write_text
from tiltflow.formatting import duration
from tiltflow.reports import plots
from tiltflow.reports.report import render

FILE = "stages.json"
DAMAGED = "nothing writes it again; the models of the stages are in stage-01/model and so on, and new stages need a new output"
HEADS = ("stage", "utility before", "after", "rise", "path KL from its base", "training")


def write_stages_report(folder: Path) -> Path:
    """Write `report.html` beside stages.json, and return its path. Raises InputError if that cannot be read."""
    text = render("stages.html.j2", final_name(folder), {"runs": [], "shown": None}, **stages_values(folder))
    path = folder / "report.html"
    write_text(path, text)
    return path


def stages_values(folder: Path, link: Callable[[str], str] = "{}/report.html".format) -> dict[str, Any]:
    """What the template of stages says. Raises InputError if stages.json cannot be read.

    Args:
        link: the address of the report of a stage, by its folder's name.
    """
    content = read_stages(folder)
    with trusted(folder / FILE, DAMAGED):
        rows, settings = content["stages"], content["settings"]
        return {
            "facts": [settings["method"]["name"], f"from the {settings['base']} model", f"seed {settings['seed']}"],
            "headline": headline(rows, settings["utility"]),
            "description": content.get("description", ""),
            "caveats": content.get("caveats", ()),
            "stopped": rows[-1]["stopped"] if rows else None,
            "svg": curve(rows),
            "heads": HEADS,
            "rows": [{"stage": row["stage"], "href": link(row["folder"]), "cells": cells(row)} for row in rows],
            "pictures": pictures(folder, rows),
        }


def read_stages(folder: Path) -> dict[str, Any]:
    """The content of stages.json. Raises InputError, which says what is left, if that cannot be read."""
    try:
        return read_json(folder / FILE)
    except InputError as error:
        raise InputError(f"{error}; {DAMAGED}") from None


def headline(rows: Sequence[Mapping[str, Any]], utility: Any) -> str:
    """What the stages have come to, in a sentence."""
    name = utility["name"] if isinstance(utility, Mapping) else utility
    before, after = (known(rows[i], side) for i, side in ((0, "before"), (-1, "after"))) if rows else (None, None)
    moved = f": from {before} to {after}" if before is not None and after is not None else ""
    return f"{len(rows)} {'stage' if len(rows) == 1 else 'stages'} for the utility {name}{moved}"


def known(row: Mapping[str, Any], name: str) -> Estimate | None:
    """An estimate of a row, if it is known."""
    return None if row[name] is None else Estimate(row[name], row[f"{name}_error"])


def cells(row: Mapping[str, Any]) -> list[str]:
    """The cells of a row of the table after the number of the stage."""
    estimates = [known(row, name) for name in ("before", "after", "rise", "path_kl")]
    return [*("–" if each is None else str(each) for each in estimates), duration(row["seconds"])]


def curve(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The utility over the stages; None where it is not known."""
    if not rows or any(known(row, side) is None for row in rows for side in ("before", "after")):
        return None
    values = [(rows[0]["before"], rows[0]["before_error"]), *((row["after"], row["after_error"]) for row in rows)]
    looks = [{"step": i, "measures": {"utility": value}, "alarm": False} for i, value in enumerate(values)]
    return plots.looks(looks, "utility", "stage")


def pictures(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The pictures of the first model and of each stage, where samples are some."""
    found = [("the first model", folder / rows[0]["folder"] / "before.png")] if rows else []
    found += [(f"after stage {row['stage']}", folder / row["folder"] / "after.png") for row in rows]
    return [
        {"title": title, "data": base64.b64encode(path.read_bytes()).decode("ascii")} for title, path in found if path.exists()
    ]
