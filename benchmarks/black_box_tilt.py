"""A reward without a gradient at equal reward evaluations: Tilt Matching beside Score as Action and DDPO, whole runs.

    python benchmarks/black_box_tilt.py --seeds 3 --output runs/black-box      # nine runs, some minutes each

The reward is minus the size of the PNG file, beta 30 bytes: a tilt whose target base samples still know, so that the distance
to it can be measured. Each method sees 6,400 rewards: 25 batches of 256 for Tilt Matching (`digits-png-tilt`), 100 of 64
for the others (`digits-png`). DDPO has no temperature; --rate is its learning rate. Mean and standard deviation over the seeds.
Started again, it goes on with the runs that are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from black_box import DDPO

from tiltflow.formatting import number
from tiltflow.runs.recipe import find_recipe, read_recipe_tree
from tiltflow.runs.sweep import sweep

BETA = 30
SHARED = [f"method.beta={BETA}", "evaluation.num_samples=2048"]
METHODS: dict[str, tuple[str, list[str]]] = {
    "tilt-matching": ("digits-png-tilt", SHARED),
    "score-as-action": ("digits-png", SHARED),
    "ddpo": ("digits-png", [*SHARED, *DDPO]),  # its beta is used by the report alone
}
COLUMNS = {
    "rewards": "samples_drawn",
    "evaluations": "network_evaluations",
    "mean reward": "reward_tuned",
    "the target's": "reward_target",
    "distance to target": "target_distance",
    "floor": "target_distance_floor",
    "achieved tilt": "achieved_tilt",
    "R2": "achieved_tilt_r2",
    "judge is sure": "judge.sure_tuned",
    "seconds": "seconds",
}
"""Of each column: the key of the summary, dotted into its mappings."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--rate", default="1e-6", help="DDPO's learning rate")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipes, for all")
    parser.add_argument("--output", type=Path, default=Path("runs/black-box"), help="folder of the runs")
    options = parser.parse_args()

    print(f"{'':24}" + "".join(f"{title:>22}" for title in COLUMNS))
    for name in options.methods:
        recipe, overrides = METHODS[name]
        tree = read_recipe_tree(
            find_recipe(recipe, "train"), [key.format(rate=options.rate) for key in overrides] + options.set
        )
        folder = options.output / (f"{name}-{options.rate}" if name == "ddpo" else name)
        done = sweep(tree, {"seed": list(range(options.seeds))}, folder, processes=options.processes)
        failed = [run["error"] for run in done["runs"] if "error" in run]
        if failed:
            raise SystemExit(failed[0])
        summaries = [json.loads((folder / run["name"] / "summary.json").read_text(encoding="utf-8")) for run in done["runs"]]
        print(f"{folder.name:24}" + "".join(f"{spread(summaries, key):>22}" for key in COLUMNS.values()), flush=True)


def spread(summaries: list[dict[str, Any]], key: str) -> str:
    """Mean ± standard deviation over the runs, or a dash where one of them has no such number."""
    values = [value for summary in summaries if (value := number(summary, key)) is not None]
    if len(values) < len(summaries):
        return "-"
    return f"{statistics.mean(values):.4g} ± {statistics.stdev(values) if len(values) > 1 else 0:.2g}"


if __name__ == "__main__":
    main()
