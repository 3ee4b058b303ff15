"""A shipped recipe of the digits, from several seeds: the row of README's table, as mean ± standard deviation over the seeds.

    python benchmarks/demo_seeds.py                                      # the run of `make demo`
    python benchmarks/demo_seeds.py --recipe digits-even-pixels --seeds 4

Each seed is a whole run in a folder of --output, with its report. Started again, it goes on with the seeds that are missing.
Writes seeds.json beside the runs, and before-after.png, the pictures of the first one, as README shows them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tiltflow.formatting import get, number
from tiltflow.reports.plots import side_by_side
from tiltflow.runs.recipe import find_recipe, read_recipe_tree
from tiltflow.runs.sweep import sweep

MEASURES = {
    "share of the group, base": "judge.group.base",
    "share of the group, tuned": "judge.group.tuned",
    "share of the group, target": "judge.group.target",
    "distance to the target": "target_distance",
    "distance of the base": "target_distance_base",
    "floor": "target_distance_floor",
    "standard error of the distance": "target_distance_error",
    "judge is sure, base": "judge.sure_base",
    "judge is sure, tuned": "judge.sure_tuned",
    "achieved tilt": "achieved_tilt",
    "mean reward, base": "reward_base",
    "mean reward, tuned": "reward_tuned",
    "mean reward, target": "reward_target",
    "working temperature": "working_beta",
    "effective sample size": "effective_sample_size",
    "seconds of training": "seconds",
    "seconds in all": "seconds_total",
}
"""Of each line: the key of the summary, dotted into its mappings."""


RATIOS = {
    "distance over floor": ("distance to the target", "floor"),
    "share of the group over the target's": ("share of the group, tuned", "share of the group, target"),
    "judge is sure, tuned over base": ("judge is sure, tuned", "judge is sure, base"),
}
"""Of each line: the measures whose quotient it is."""


def collect(summaries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each measure that every run has: its values, their mean and their standard deviation."""
    values = {}
    for title, key in MEASURES.items():
        each = [value for summary in summaries if (value := number(summary, key)) is not None]
        if each and len(each) == len(summaries):
            values[title] = each
    for title, (over, under) in RATIOS.items():
        if over in values and under in values:
            values[title] = [a / b for a, b in zip(values[over], values[under], strict=True)]
    return {
        title: {"mean": statistics.mean(each), "std": statistics.stdev(each) if len(each) > 1 else 0.0, "values": each}
        for title, each in values.items()
    }


def row(found: Mapping[str, Mapping[str, Any]], summaries: Sequence[Mapping[str, Any]]) -> str:
    """The sentence of the README's table."""

    def pm(title: str, form: str, scale: float = 1.0) -> str:
        values = found[title]
        return f"{scale * values['mean']:{form}} ± {scale * values['std']:{form}}"

    group = get(summaries[0], "judge.group.label")
    return (
        f"an independent judge sees {pm('share of the group, base', '.1f', 100)} % of {group} before,"
        f" {pm('share of the group, tuned', '.1f', 100)} % after,"
        f" the target has {pm('share of the group, target', '.1f', 100)} %;"
        f" total variation of the classes to that target {pm('distance to the target', '.3f')},"
        f" floor {found['floor']['mean']:.3f}, before {found['distance of the base']['mean']:.3f};"
        f" the judge is sure of {pm('judge is sure, tuned', '.1f', 100)} %, of base samples"
        f" {pm('judge is sure, base', '.1f', 100)} %; achieved tilt {pm('achieved tilt', '.2f')};"
        f" mean reward {pm('mean reward, tuned', '.2f')}, the target's {pm('mean reward, target', '.2f')};"
        f" {found['seconds of training']['mean']:.0f} s of training, {found['seconds in all']['mean']:.0f} s in all"
        f" ({len(summaries)} seeds)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits-even", help="one whose evaluation has a judge and a group")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe")
    parser.add_argument("--output", type=Path, help="folder of the runs (default: runs/seeds/RECIPE)")
    options = parser.parse_args()
    folder = options.output or Path("runs/seeds") / Path(options.recipe).stem

    tree = read_recipe_tree(find_recipe(options.recipe, "train"), options.set)
    seeds = list(range(options.seeds))
    done = sweep(tree, {"seed": seeds}, folder, processes=options.processes, watch=lambda *what: print(*what, flush=True))
    failed = [run["error"] for run in done["runs"] if "error" in run]
    if failed:
        raise SystemExit(failed[0])
    summaries = [json.loads((folder / run["name"] / "summary.json").read_text(encoding="utf-8")) for run in done["runs"]]
    found = collect(summaries)
    for title, values in found.items():
        each = "  ".join(f"{value:8.3f}" for value in values["values"])
        print(f"{title:37} {values['mean']:8.3f} ± {values['std']:.3f}   {each}")
    print(row(found, summaries))
    before, after = (Image.open(folder / done["runs"][0]["name"] / f"{when}.png") for when in ("before", "after"))
    side_by_side(before, after).save(folder / "before-after.png")
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": summaries[0]["torch"]}
    (folder / "seeds.json").write_text(
        json.dumps({"recipe": tree, "seeds": seeds, **machine, "measures": found}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
