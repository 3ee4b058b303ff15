"""Writing the report of a comparison: one HTML page of what is in its folder, comparison.json and pictures."""

# Mutation tests: none: words and pages

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltflow.files import final_name, read_json, trusted, write_text
from tiltflow.formatting import decimal, duration, told_apart
from tiltflow.reports import compared
from tiltflow.reports.report import render
from tiltflow.reports.tables import Cell

FILE = "comparison.json"
HEADS = {
    "reward": "reward",
    "distance": "distance to the target",
    "achieved_tilt": "achieved tilt",
    "path_kl": "path KL",
    "diversity": "diversity",
    "network_evaluations": "network evaluations",
    "reward_evaluations": "reward evaluations",
    "seconds": "seconds",
}
"""Columns of the table, and their heads."""
TITLES = {"reward": "Mean reward", "distance": "Distance to the target law", "diversity": "Diversity"}
BUDGETS = {"network_evaluations": "network evaluations", "reward_evaluations": "reward evaluations", "seconds": "seconds"}
Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """What the page says of a problem or recipe."""

    title: str
    facts: str
    lede: str
    far: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    stopped: Sequence[str]
    differences: Sequence[tuple[str, Sequence[Sequence[str]]]]
    plots: Sequence[tuple[str, str, str]]
    pictures: Sequence[tuple[str, str]]
    tuning: Sequence[Sequence[str]]


def write_comparison_report(folder: Path) -> Path:
    """Write `report.html` beside comparison.json, and return its path. Raises InputError if that cannot be read."""
    text = render("comparison.html.j2", final_name(folder), {"runs": [], "shown": None}, **comparison_values(folder))
    path = folder / "report.html"
    write_text(path, text)
    return path


def comparison_values(folder: Path) -> dict[str, Any]:
    """What the template of a comparison says. Raises InputError if comparison.json cannot be read."""
    source = folder / FILE
    content = read_json(source)
    with trusted(source, "the same `tiltflow compare` writes it again"):
        return {
            "name": final_name(folder),
            "facts": facts(content),
            "sections": [section(content, each, folder) for each in content["results"]],
            "tuned": content["tune"] != "none",
            "share": f"{content['share_of_tuning']:.0%}",
            "seeds": content["seeds"],
            "budget": budget(content),
        }


def budget(content: Tree) -> str:
    """The budget, in words."""
    kind, amount = content["budget"]["kind"], content["budget"]["amount"]
    return duration(amount) if kind == "seconds" else f"{amount:,.0f} {BUDGETS[kind]}"


def facts(content: Tree) -> list[str]:
    """What was compared, in a few words each."""
    seeds = content["seeds"]
    return [
        f"{len(content['methods'])} methods",
        f"{seeds} seed{'s' if seeds > 1 else ''}",
        f"{budget(content)} each",
        f"learning rates {'tuned' if content['tune'] != 'none' else 'not tuned'}",
    ]


def section(content: Tree, found: Tree, folder: Path) -> Section:
    """What there is to say of a subject."""
    best = {key: each["best"] for key, each in found["differences"].items() if each}
    others = list(found.get("held_out_base", {}))
    heads = {key: head for key, head in HEADS.items() if any(has_mean(m, key) for m in found["methods"])}
    rows = [
        [Cell(m["method"]), *(cell(m, key, best.get(key) == m["method"]) for key in heads), *of_others(m, others)]
        for m in found["methods"]
    ]
    return Section(
        title=found["subject"],
        facts=references(found),
        lede=lede(found),
        far=far(found, content["near"]),
        heads=["method", *heads.values(), *others],
        rows=rows,
        stopped=[f"{m['method']}, {each}" for m in found["methods"] for each in m["stopped"]],
        differences=[
            (f"{TITLES[key]}: difference to {each['best']}", [difference(row) for row in each["others"]])
            for key, each in found["differences"].items()
            if each
        ],
        plots=plots(content, found),
        pictures=pictures(folder, found),
        tuning=[row for m in found["methods"] for row in tuning(m)],
    )


def has_mean(method: Tree, key: str) -> bool:
    """Whether a column of `HEADS` says something of a method."""
    return method.get(key, {"mean": None})["mean"] is not None


def of_others(method: Tree, names: Sequence[str]) -> list[Cell]:
    """The cells of a method in the columns of rewards that were not trained on."""
    return [cell(method["held_out"], name, best=False) for name in names]


def cell(method: Tree, key: str, best: bool) -> Cell:
    """The cell of a method in a column of `HEADS`."""
    found = method.get(key, {"mean": None, "error": None})
    mean, error = found["mean"], found["error"]
    if mean is None:
        return Cell("–")
    if abs(mean) >= 1e5 and not key.endswith("evaluations"):  # it ran away
        return Cell(f"{mean:.1g}", mean, best)
    return Cell(f"{mean:,.0f}" if key.endswith("evaluations") else decimal(mean, error), mean, best)


def references(found: Tree) -> str:
    """What the base and the target law have, in words."""
    known = {key: each["mean"] for key, each in found["references"].items()}
    floors = [m["floor"]["mean"] for m in found["methods"] if m["floor"]["mean"] is not None]
    said = ["the reward is a black box, without a gradient"] if found["black_box"] else []
    said += [f"target law: {found['law']}, beta = {found['beta']:g}"]
    for name, title in (("reward", "mean reward"), ("distance", "distance to the target"), ("diversity", "diversity")):
        sides = [(side, known.get(f"{name}_{side}")) for side in ("base", "target")]
        numbers = {side: value for side, value in sides if value is not None}
        words = [f"{text} of the {side}" for side, text in zip(numbers, told_apart([*numbers.values()]), strict=True)]
        words += [f"{decimal(max(floors))} of two exact samples, its floor"] if name == "distance" and floors else []
        said += [f"{title} {', '.join(words)}"] if words else []
    for name, each in found.get("held_out_base", {}).items():
        said += [f"{name} {decimal(each['mean'])} of the base"] if each["mean"] is not None else []
    return "; ".join(said) + "."


def lede(found: Tree) -> str:
    """Which methods are best, and which of the others are not told from them."""
    said = []
    for key, title in (("distance", "nearest to the target law"), ("reward", "largest mean reward of those near it")):
        each = found["differences"].get(key)
        if each:
            close = [row["method"] for row in each["others"] if row["p"] is None or row["p"] > 0.05]
            said.append(f"{title}: {each['best']}" + (f", not told from {', '.join(close)}" if close else ""))
    return "; ".join(said)[:1].upper() + "; ".join(said)[1:] + "." if said else ""


def far(found: Tree, share: float) -> str:
    """Which methods are not called best in reward and diversity, and why."""
    names = [m["method"] for m in found["methods"] if m["near"] is False]
    if names:
        return (
            f"Stopped, or further from the target law than {share:.0%} of the base's distance, and so not called best in reward"
            f" or diversity: {', '.join(names)}."
        )
    if all(m["near"] is None for m in found["methods"]):
        return "The distance to the target law is not known here: the largest reward may be that of a method that ran away."
    return ""


def difference(row: Tree) -> list[str]:
    """The cells of a difference to the best."""
    interval = "–" if row["low"] is None else f"{decimal(row['low'])} to {decimal(row['high'])}"
    p = "–" if row["p"] is None else "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"
    return [row["method"], decimal(row["mean"]), interval, p, str(row["n"])]


def plots(content: Tree, found: Tree) -> list[tuple[str, str, str]]:
    """The curves and the fronts as SVG, each with a title and what it does not show."""
    kind, known, drawn = content["budget"]["kind"], found["references"], list[tuple[str, str, str]]()

    def levels_of(key: str) -> dict[str, float | None]:
        return {side: known[f"{key}_{side}"]["mean"] for side in ("base", "target") if f"{key}_{side}" in known}

    def hidden(key: str) -> list[str]:
        return compared.outside({m["method"]: m[key]["mean"] for m in found["methods"]}, compared.window(levels_of(key)))

    for key in ("reward", "distance"):
        series = {
            m["method"]: [(point[kind]["mean"], point[key]) for point in m["points"] if point[kind]["mean"] is not None]
            for m in found["methods"]
        }
        if any(value["mean"] is not None for points in series.values() for _, value in points):
            log = key == "distance"
            svg = compared.curves(series, BUDGETS[kind], TITLES[key], levels_of(key), log=log)
            drawn.append((f"{TITLES[key]} against {BUDGETS[kind]}", svg, beyond([] if log else hidden(key))))
    for cost in ("distance", "diversity"):
        if any(m[cost]["mean"] is not None for m in found["methods"]):
            shown = None if cost == "distance" else compared.window(levels_of(cost))
            svg = compared.front(
                found["methods"], cost, TITLES[cost].lower(), levels_of("reward"), shown, log=cost == "distance"
            )
            left_out = {*hidden("reward"), *([] if cost == "distance" else hidden(cost))}
            names = [m["method"] for m in found["methods"] if m["method"] in left_out]
            drawn.append((f"Reward against {TITLES[cost].lower()}", svg, beyond(names)))
    return drawn


def beyond(names: Sequence[str]) -> str:
    """Which methods a plot does not show all of."""
    return f"Beyond the edge: {', '.join(names)}." if names else ""


def pictures(folder: Path, found: Tree) -> list[tuple[str, str]]:
    """The pictures of seed 0 that are there, each with its title, as PNG in base64: of base, target law and methods."""
    points, runs = folder / "pictures" / found["subject"], folder / "runs" / found["subject"]
    names = [m["method"] for m in found["methods"]]
    first = {name: points / f"{name}.png" for name in ("base", "target", *names)}
    of_runs = {name: runs / f"{name},seed=0" / "after.png" for name in names}
    before = [path for name in names if (path := runs / f"{name},seed=0" / "before.png").exists()]
    files = [*first.items(), *([("base", before[0])] if before else []), *of_runs.items()]
    return [(name, base64.b64encode(path.read_bytes()).decode("ascii")) for name, path in files if path.exists()]


def tuning(method: Tree) -> list[list[str]]:
    """The rows of the tuning of a method: its candidates, and which was chosen."""
    rows = []
    for each in method["tuning"]["candidates"]:
        chosen = "chosen" if each["factor"] == method["factor"] else ""
        if chosen and each["factor"] in (min(factors(method)), max(factors(method))):
            chosen = "chosen, at the edge"
        numbers = ["–" if each[key] is None else decimal(each[key]) for key in ("reward", "distance")]
        rows.append([method["method"], f"{each['learning_rate']:.3g}", *numbers, each["stopped"] or chosen])
    return rows


def factors(method: Tree) -> list[float]:
    """The factors of the candidates."""
    return [each["factor"] for each in method["tuning"]["candidates"]]
