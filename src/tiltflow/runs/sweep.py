"""A grid of training runs: every combination of values of some settings, each a run in its own folder, and what they trade.

sweep.yaml       the recipe and the grid: the same command goes on where it was stopped
<point>/         a finished run, as `tiltflow train` makes it; `<point>.partial` while it is under way
sweep.json       one row for each point: its values, reward, and what else was measured; `distance` names the cost of reward
pareto.svg       reward against that cost: for image models the distance to the base in W2; for pipelines the FID to the
                 reference where there is one, else the path KL to the base
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tiltflow.errors import InputError, TiltflowError
from tiltflow.evaluation.metrics import every_metric
from tiltflow.files import PARTIAL, read_json, trusted, write_json, write_text, writing
from tiltflow.plugins import allow_code, code_allowed
from tiltflow.reports.plots import pareto
from tiltflow.runs.lock import working_in
from tiltflow.runs.recipe import Recipe, read_recipe
from tiltflow.runs.resume import flat
from tiltflow.runs.run import run
from tiltflow.runs.run_files import claim, write_yaml
from tiltflow.settings import apply_overrides, parse_yaml, read_yaml

COSTS = {metric.swept: metric for metric in every_metric() if metric.cost}
"""What may be the cost of reward, the first one that was measured."""
DISTANCES = {name: metric.axis for name, metric in COSTS.items()}
"""Their titles."""
SEED = "seed"


@dataclass(frozen=True)
class Point:
    """One combination of values, its complete recipe and the name of its folder."""

    name: str
    values: dict[str, Any]
    recipe: Recipe


def parse_grid(over: Sequence[str]) -> dict[str, list[Any]]:
    """`key=1,2,3` or `key=[1, 2, 3]` for each setting -> its values. Raises InputError for anything else."""
    grid: dict[str, list[Any]] = {}
    for text in over:
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
        raise InputError("give at least one --over key=value,value,..")
    return grid


def points_of(tree: Mapping[str, Any], grid: Mapping[str, list[Any]], where: str) -> list[Point]:
    """Every combination, checked. Raises InputError if the recipe does not allow one."""
    names = short_names(list(grid))
    found = []
    for values in product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        overrides = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
        name = ",".join(f"{names[key]}={_word(value)}" for key, value in chosen.items())
        found.append(Point(name, chosen, read_recipe(apply_overrides(dict(tree), overrides), f"{where}, {name}")))
    if len({point.name for point in found}) != len(found):
        raise InputError("--over: two combinations would have folders of the same name")
    return found


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, the whole of it where two would be the same."""
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
    """Run the points that are not yet there, and draw the front. Returns what sweep.json holds.

    Args:
        tree: a recipe, not yet validated.
        watch: is told the name of each point and what became of it.

    A point that stops with an error of its own is recorded, and tried again by the next call; the others go on. Raises
    InputError, with nothing run, if a point is not a valid recipe, or the folder holds something else.
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
    """`sweep`, in a folder that is locked."""
    known = folder / "sweep.yaml"
    if known.exists():
        if read_yaml(known) != plan:
            raise InputError(f"{folder}: holds another sweep; give a new --output, or the recipe and --over of {known}")
    else:
        claim(folder)
    write_yaml(known, plan)

    todo = [point for point in points if not (folder / point.name / "summary.json").exists()]
    for point in points:
        if point not in todo:
            watch(point.name, "there already")
    failures: dict[str, str] = {}
    threads = max(1, (os.cpu_count() or 1) // max(processes, 1))
    with ProcessPoolExecutor(min(processes, max(len(todo), 1)), multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(run_point, point, folder, device, threads, code_allowed()): point for point in todo}
        try:
            for job in as_completed(jobs):
                point = jobs[job]
                if (problem := job.result()) is not None:
                    failures[point.name] = problem
                watch(point.name, problem or "done")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    result = collect(points, folder, failures)
    write_json(folder / "sweep.json", result)
    shown = list(short_names([key for key in grid if key != SEED]).values())
    distance = result["distance"]
    write_text(folder / "pareto.svg", pareto(result["points"], shown, COSTS[distance]))
    return result


def run_point(point: Point, folder: Path, device: str, threads: int, code_of_runs: bool = False) -> str | None:
    """Train and evaluate one point. Returns what went wrong, if something of its own did."""
    torch.set_num_threads(threads)
    partial = folder / f"{point.name}{PARTIAL}"
    try:
        with writing(partial):
            if partial.exists():
                shutil.rmtree(partial)
        with allow_code() if code_of_runs else nullcontext():
            run(point.recipe, partial, device=device)
        with writing(partial):
            partial.rename(folder / point.name)
    except TiltflowError as error:
        return str(error)
    return None


def beats(one: Mapping[str, Any], other: Mapping[str, Any], distance: str = "w2_base") -> bool:
    """At least as much reward, at most as far by the measure `distance`, and not the same."""
    gain, nearer = one["reward_tuned"] - other["reward_tuned"], other[distance] - one[distance]
    return bool(gain >= 0 and nearer >= 0 and gain + nearer > 0)


def measured(summary: Mapping[str, Any]) -> dict[str, float]:
    """What a sweep compares, from the summary of a run. Raises KeyError if it has no mean rewards."""
    found = {key: summary[key] for key in ("reward_base", "reward_tuned")}
    compared = [metric for metric in every_metric() if metric.compared]
    known = {key: value for key, value in flat(summary).items() if value is not None or key not in COSTS}
    found |= {metric.swept: known[metric.key] for metric in compared if metric.source == "summary" and metric.key in known}
    for row in summary.get("table", [])[:2]:  # the base and the tuned model at the first point
        of_row = [metric.key for metric in compared if metric.source == "table" and metric.key in row]
        found |= {f"{key}_{row['model']}": row[key] for key in of_row}
    return found


def collect(points: Sequence[Point], folder: Path, failures: Mapping[str, str]) -> dict[str, Any]:
    """One row for each point, and one for each combination of the other values over its seeds, with mean and spread; and which
    of their measures is the cost of reward, a key of `DISTANCES` that all have."""
    names = short_names(list(points[0].values))
    rows = []
    for point in points:
        row: dict[str, Any] = {"name": point.name, **{names[key]: value for key, value in point.values.items()}}
        path = folder / point.name / "summary.json"
        if path.exists():
            try:
                with trusted(path):
                    row |= measured(read_json(path))
            except InputError as error:
                row["error"] = str(error)
        else:
            row["error"] = failures.get(point.name, "not run")
        rows.append(row)

    others = [names[key] for key in points[0].values if key != SEED]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row[key] for key in others]), []).append(row)
    summaries = []
    for members in groups.values():
        finished = [row for row in members if "error" not in row]
        merged: dict[str, Any] = {key: members[0][key] for key in others} | {"runs": len(finished)}
        for key in finished[0] if finished else ():
            if key not in (*others, "name", SEED) and all(key in row for row in finished):
                values = [row[key] for row in finished]
                known = None not in values  # of a target law that is not known there is no distance
                merged[key] = statistics.mean(values) if known else None
                merged[f"{key}_std"] = statistics.pstdev(values) if known else None
        if not finished:
            merged["error"] = members[0]["error"]
        summaries.append(merged)
    finished = [row for row in summaries if "error" not in row]
    distance = next((key for key in DISTANCES if all(key in row for row in finished)), next(iter(DISTANCES)))
    for row in finished:
        row["on_front"] = not any(beats(other, row, distance) for other in finished)
    return {"distance": distance, "runs": rows, "points": summaries}
