"""A grid of training runs: a run for every combination of values of some settings, and its reward against its cost.

sweep.yaml       the recipe and the grid: rerun the same command to continue a sweep
<point>/         a finished run, as `tiltflow train` writes it; `<point>.partial` while it trains, which is gone on with
sweep.json       one row for each point: its values, reward and other measures; `distance` names the cost of reward
table.csv        the tables of the runs' sampling points, means over seeds with their standard errors
pareto.svg       reward against that cost: for image models the distance to the base in W2; for pipelines the FID to the
                 reference if there is one, else the path KL to the base
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from tiltflow.errors import InputError, TiltflowError
from tiltflow.evaluation.metrics import every_metric
from tiltflow.evaluation.table import OF_POINT
from tiltflow.files import PARTIAL, read_json, trusted, write_json, write_text, writing
from tiltflow.reports.plots import pareto
from tiltflow.runs.checkpoint import FOLDER, checkpoints
from tiltflow.runs.jobs import run_all
from tiltflow.runs.lock import working_in
from tiltflow.runs.recipe import Recipe, read_one_run
from tiltflow.runs.resume import flat
from tiltflow.runs.run import run
from tiltflow.runs.run_files import claim, write_yaml
from tiltflow.settings import apply_overrides, parse_yaml, read_yaml

COSTS = {metric.swept: metric for metric in every_metric() if metric.cost}
"""Metrics that can be the cost of reward, in order of preference."""
DISTANCES = {name: metric.axis for name, metric in COSTS.items()}
"""The titles of these metrics."""
SEED = "seed"


@dataclass(frozen=True)
class Point:
    """One combination of values, its complete recipe and the name of its folder."""

    name: str
    values: dict[str, Any]
    recipe: Recipe


def parse_grid(over: Sequence[str], seeds: int | None = None) -> dict[str, list[Any]]:
    """Parse `key=1,2,3` or `key=[1, 2, 3]` for each setting into its values. Raises InputError for anything else.

    Args:
        seeds: a number of seeds, from 0 on, as the last setting.
    """
    grid: dict[str, list[Any]] = {}
    for text in (*over, f"{SEED}={','.join(map(str, range(seeds)))}") if seeds else over:
        key, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not key or not values:
            raise InputError(f"--over {text}: must read key=value,value,.. for example method.alpha=0,0.3,1")
        listed = parse_yaml(values if values.startswith("[") else f"[{values}]", f"--over {key}")
        if not isinstance(listed, list) or len(set(map(repr, listed))) != len(listed) or not listed:
            raise InputError(f"--over {text}: must give different values")
        if key in grid:
            raise InputError(f"--over {text}: {key} is given twice")
        grid[key] = listed
    if not grid:
        raise InputError("give at least one --over key=value,value,.. or --seeds")
    return grid


def points_of(tree: Mapping[str, Any], grid: Mapping[str, list[Any]], where: str) -> list[Point]:
    """Make and check the recipe of every combination. Raises InputError if one is not valid."""
    names = short_names(list(grid))
    found = []
    for values in product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        overrides = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
        name = ",".join(f"{names[key]}={_word(value)}" for key, value in chosen.items())
        found.append(Point(name, chosen, read_one_run(apply_overrides(dict(tree), overrides), f"{where}, {name}")))
    if len({point.name for point in found}) != len(found):
        raise InputError("--over: two combinations would have folders of the same name")
    return found


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shorten each dotted key to its last part, unless two would be the same."""
    last = [key.split(".")[-1] for key in keys]
    return {key: key if last.count(name) > 1 else name for key, name in zip(keys, last, strict=True)}


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(letter if letter.isalnum() or letter in "-+._[]" else "_" for letter in text)


def sweep(
    tree: Mapping[str, Any],
    grid: Mapping[str, list[Any]],
    folder: Path,
    *,
    processes: int = 1,
    device: str = "cpu",
    watch: Callable[[str, str], None] = lambda name, what: None,
) -> dict[str, Any]:
    """Run the points that are missing, and draw the Pareto front. Returns the content of sweep.json.

    A point that fails is recorded, the others continue, and the next call tries it again.

    Args:
        tree: a recipe, not yet validated.
        watch: is told the name and the result of each point.

    Raises InputError, with nothing run, if a point is not a valid recipe, or the folder holds something else.
    """
    points = points_of(tree, grid, "sweep")
    plan = {"recipe": json.loads(json.dumps(tree)), "over": {key: list(values) for key, values in grid.items()}}
    with working_in(folder):
        return _sweep(points, grid, plan, folder, processes, device, watch)


def _sweep(
    points: Sequence[Point],
    grid: Mapping[str, list[Any]],
    plan: dict[str, Any],
    folder: Path,
    processes: int,
    device: str,
    watch: Callable[[str, str], None],
) -> dict[str, Any]:
    """`sweep` in a locked folder."""
    known = folder / "sweep.yaml"
    if known.exists():
        if not continues(read_yaml(known), plan):
            raise InputError(f"{folder}: holds another sweep; give a new --output, or the recipe and --over of {known}")
    else:
        claim(folder)
    write_yaml(known, plan)

    todo = [point for point in points if not (folder / point.name / "summary.json").exists()]
    for point in points:
        if point not in todo:
            watch(point.name, "already done")
    failures = _run_all(todo, folder, processes, device, watch)
    result = collect(points, folder, failures)
    write_json(folder / "sweep.json", result)
    write_text(folder / "table.csv", as_csv(result["table"]))
    shown = list(short_names([key for key in grid if key != SEED]).values())
    distance = result["distance"]
    write_text(folder / "pareto.svg", pareto(result["points"], shown, COSTS[distance]))
    return result


def continues(before: Mapping[str, Any], plan: Mapping[str, Any]) -> bool:
    """True if a plan has the recipe, the settings and all the values of an earlier one, and perhaps more, such as seeds."""
    old, new = before.get("over", {}), plan["over"]
    same = before.get("recipe") == plan["recipe"] and list(old) == list(new)
    return same and all(value in new[key] for key, values in old.items() for value in values)


def _run_all(
    todo: Sequence[Point], folder: Path, processes: int, device: str, watch: Callable[[str, str], None]
) -> dict[str, str]:
    """Run points, several at a time. Returns the error of each one that failed, by name."""
    failures: dict[str, str] = {}
    for point, problem in run_all(partial(run_point, folder=folder, device=device), todo, processes):
        if problem is not None:
            failures[point.name] = problem
        watch(point.name, problem or "done")
    return failures


def run_point(point: Point, folder: Path, device: str) -> str | None:
    """Train and evaluate a point. Returns the error if it fails."""
    draft, recipe = folder / f"{point.name}{PARTIAL}", point.recipe
    try:
        with writing(draft):
            if checkpoints(draft / FOLDER):
                training = recipe.training.model_copy(update={"resume_from_checkpoint": "latest"})
                recipe = recipe.model_copy(update={"training": training})
            elif draft.exists():
                shutil.rmtree(draft)
        run(recipe, draft, device=device)
        with writing(draft):
            draft.rename(folder / point.name)
    except TiltflowError as error:
        return str(error)
    return None


def beats(one: Mapping[str, Any], other: Mapping[str, Any], distance: str = "w2_base") -> bool:
    """True if one row has at least the reward of the other at no greater `distance`, and is better in one of both."""
    gain, nearer = one["reward_tuned"] - other["reward_tuned"], other[distance] - one[distance]
    return bool(gain >= 0 and nearer >= 0 and gain + nearer > 0)


def measured(summary: Mapping[str, Any]) -> dict[str, float]:
    """The measures that a sweep compares, from the summary of a run. Raises KeyError if it has no mean rewards."""
    found = {key: summary[key] for key in ("reward_base", "reward_tuned")}
    compared = [metric for metric in every_metric() if metric.compared]
    known = {key: value for key, value in flat(summary).items() if value is not None or key not in COSTS}
    found |= {metric.swept: known[metric.key] for metric in compared if metric.source == "summary" and metric.key in known}
    for row in summary.get("table", [])[:2]:  # the base and the tuned model at the first point
        of_row = [metric.key for metric in compared if metric.source == "table" and metric.key in row]
        found |= {f"{key}_{row['model']}": row[key] for key in of_row}
    return found


def collect(points: Sequence[Point], folder: Path, failures: Mapping[str, str]) -> dict[str, Any]:
    """The content of sweep.json: a row for each run, a row for each combination of the values other than the seed, and the cost
    of reward, a key of `DISTANCES` that all have."""
    names = short_names(list(points[0].values))
    rows = [_row(point, names, folder, failures) for point in points]
    others = [names[key] for key in points[0].values if key != SEED]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[key] for key in others]), []).append(row)
    summaries = [_over_seeds(members, others) for members in groups.values()]
    finished = [row for row in summaries if "error" not in row]
    distance = next((key for key in DISTANCES if all(key in row for row in finished)), next(iter(DISTANCES)))
    for row in finished:
        row["on_front"] = not any(beats(other, row, distance) for other in finished)
    tables = [of_points for members in groups.values() for of_points in _tables(members, others, folder)]
    return {"distance": distance, "runs": rows, "points": summaries, "table": tables}


def _row(point: Point, names: Mapping[str, str], folder: Path, failures: Mapping[str, str]) -> dict[str, Any]:
    """The values of a point and its measures, or its error."""
    row: dict[str, Any] = {"name": point.name, **{names[key]: value for key, value in point.values.items()}}
    path = folder / point.name / "summary.json"
    if not path.exists():
        return row | {"error": failures.get(point.name, "not run")}
    try:
        with trusted(path):
            return row | measured(read_json(path))
    except InputError as error:
        return row | {"error": str(error)}


def _tables(members: Sequence[dict[str, Any]], others: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """The rows of the tables of runs that differ in their seed alone: of each number the mean, and its standard error over
    them; of a single run that of its samples.

    Args:
        others: the settings that these runs have in common.
    """
    tables = [read_json(folder / row["name"] / "summary.json").get("table", []) for row in members if "error" not in row]
    found = []
    for rows in zip(*tables, strict=False):
        values = {key: members[0][key] for key in others} | {key: rows[0][key] for key in OF_POINT if key in rows[0]}
        values["runs"] = len(rows)
        for key in rows[0]:
            numbers = [row.get(key) for row in rows]
            if key in OF_POINT or key.endswith("_error") or not all(isinstance(number, int | float) for number in numbers):
                continue
            values[key] = statistics.mean(numbers)
            values[f"{key}_error"] = standard_error(numbers) if len(numbers) > 1 else rows[0].get(f"{key}_error")
        found.append(values)
    return found


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table of text, with all the keys of any row as columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean of independent values; None of a single one.

    >>> standard_error([1.0, 3.0])
    1.0
    """
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def _over_seeds(members: Sequence[dict[str, Any]], others: Sequence[str]) -> dict[str, Any]:
    """The mean, the standard deviation and the standard error of each measure over runs that differ in their seed alone; None
    where one is None, and the error where there is one run.

    Args:
        others: the settings that these runs have in common.
    """
    finished = [row for row in members if "error" not in row]
    merged: dict[str, Any] = {key: members[0][key] for key in others} | {"runs": len(finished)}
    for key in finished[0] if finished else ():
        if key not in (*others, "name", SEED) and all(key in row for row in finished):
            values = [row[key] for row in finished]
            known = None not in values  # the distance to an unknown target law is None
            merged[key] = statistics.mean(values) if known else None
            merged[f"{key}_std"] = statistics.pstdev(values) if known else None
            merged[f"{key}_error"] = standard_error(values) if known else None
    if not finished:
        merged["error"] = members[0]["error"]
    return merged
