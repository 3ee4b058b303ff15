"""Few-step image quality: the 5- and the 10-step sampler of the digit diffusion model, made sharper against an energy that is
learned from data, by Score as Action and by the sampler's update of DxMI (arXiv 2407.00626), with the same budget.

    python benchmarks/few_steps.py --data mnist.npz

Prints the Frechet distance to the test images in the features of digits-judge, before and after: mean and standard deviation
over the seeds. Some 30 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tiltflow.runs.recipe import Recipe, find_recipe, read_recipe_tree
from tiltflow.runs.run import run
from tiltflow.settings import validate

METHODS: dict[str, list[str]] = {
    "score-as-action": [],
    "dxmi": [
        "method={name: dxmi, solver: euler, shift: 3.0, critic: {loss: td}, critic_warmup_steps: 40, step_price: 0}",
        "optimizer.learning_rate=3e-7",  # the best of 1e-5, 5e-6, 1e-6, 3e-7, on seed 0: nothing else holds it near the base
    ],
}


def few_steps(method: str, steps: int, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train and evaluate one run, in a folder that is thrown away."""
    torch.set_num_threads(1)
    both = [f"{part}.num_inference_steps={steps}" for part in ("method", "sampling")]
    changes = [*METHODS[method], *both, *overrides, f"seed={seed}", f"reward.seed={seed}"]
    tree = read_recipe_tree(find_recipe("digits-few-steps", "train"), changes)
    with tempfile.TemporaryDirectory() as folder:
        return run(validate(Recipe, tree, "digits-few-steps"), Path(folder) / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="MNIST as an .npz file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe, for both")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()

    data = str(Path(options.data).resolve())
    overrides = [f"reward.data={data}", f"evaluation.data={data}", *options.set]
    jobs = list(product(options.methods, (5, 10), range(options.seeds)))
    with ProcessPoolExecutor(options.processes) as pool:
        found = dict(zip(jobs, pool.map(few_steps, *zip(*jobs, strict=True), [overrides] * len(jobs)), strict=True))

    print(f"{'':17}{'steps':>6}{'evaluations':>13}{'Frechet before':>18}{'after':>18}{'sure, before -> after':>26}{'CPU s':>8}")
    for method, steps in product(options.methods, (5, 10)):
        runs = [found[method, steps, seed] for seed in range(options.seeds)]
        judges = [run["judge"] for run in runs]
        sure = [statistics.mean(judge[key] for judge in judges) for key in ("sure_base", "sure_tuned")]
        print(
            f"{method:17}{steps:6}{runs[0]['network_evaluations']:13}"
            f"{spread([judge['frechet_base'] for judge in judges]):>18}"
            f"{spread([judge['frechet_tuned'] for judge in judges]):>18}"
            f"{f'{sure[0]:.1%} -> {sure[1]:.1%}':>26}{statistics.mean(run['seconds'] for run in runs):8.0f}"
        )
    print(f"two halves of the test images: {next(iter(found.values()))['judge']['frechet_real']:.1f}")
    if options.json:
        print(json.dumps({f"{method}, {steps}, {seed}": result for (method, steps, seed), result in found.items()}))


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"


if __name__ == "__main__":
    main()
