"""Does training depend on the step size? Linear policies of the LQG problem, trained at several numbers of steps by Score as
Action and by DDPO with the KL of its transitions, the same settings at every number of steps, and evaluated, exactly, at all.

    python benchmarks/step_size.py --output docs/step-size.png

Prints a table: by how much each policy's objective is short of the optimum, mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from tiltflow.problems.verification.verify import Verification, read_verification, verify

TRAINED, EVALUATED = (5, 10, 50, 100), (5, 10, 20, 50, 100, 200)
ITERATIONS, BATCH = 400, 512
METHODS: dict[str, list[str]] = {
    "score-as-action": [],
    # the same optimizer and number of samples; standardised rewards, PPO's clip, the KL of the transitions of DDPM
    "ddpo + KL": [
        "preset=ddpo",
        "running_reward=transition-kl",
        "clip_range=0.2",
        "lr_scheduler=cosine",
        "learning_rate=2e-2",
        "solver=ddpm",
    ],
}


def settings_of(method: str, steps: int, seed: int) -> Verification:
    overrides = [*METHODS[method], f"N={steps}", f"seed={seed}", f"evaluate_steps={list(EVALUATED)}", "num_samples=100"]
    overrides += [f"iterations={ITERATIONS}", f"train_batch_size={BATCH}", "trajectories=2", "draws=2"]
    return read_verification("lqg", "score-as-action", overrides)


def shortfalls(settings: Verification) -> dict[int, float]:
    """How far the trained policy is below the optimum of each chain it is evaluated on, relative to that optimum."""
    torch.set_num_threads(1)
    rows = verify(settings).values["at_other_steps"]
    return {n: (rows[str(n)]["optimum"] - rows[str(n)]["objective"]) / abs(rows[str(n)]["optimum"]) for n in EVALUATED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", help="draw the table as a .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()

    jobs = [(method, steps, seed) for method in METHODS for steps in TRAINED for seed in range(options.seeds)]
    with ProcessPoolExecutor(options.processes) as pool:
        found = dict(zip(jobs, pool.map(shortfalls, [settings_of(*job) for job in jobs]), strict=True))

    results: dict[str, Any] = {}
    for method in METHODS:
        print(f"\n{method}: short of the optimum by, evaluated at")
        print("trained at" + "".join(f"{n:>16}" for n in EVALUATED))
        for steps in TRAINED:
            runs = [found[method, steps, seed] for seed in range(options.seeds)]
            row = {n: [run[n] for run in runs] for n in EVALUATED}
            results.setdefault(method, {})[steps] = row
            spread = [f"{statistics.mean(v):8.2%} ± {statistics.pstdev(v):.2%}" for v in row.values()]
            print(f"{steps:10}" + "".join(f"{text:>16}" for text in spread))
    if options.output:
        draw(results, options.output)
    if options.json:
        print(json.dumps(results))


def draw(results: dict[str, Any], path: str) -> None:
    """One panel a method, one line for each number of steps in training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results), sharey=True)
    for panel, (method, rows) in zip(panels, results.items(), strict=True):
        for steps, row in rows.items():
            means = [100 * statistics.mean(values) for values in row.values()]
            spread = [100 * statistics.pstdev(values) for values in row.values()]
            panel.errorbar(list(row), means, spread, marker="o", capsize=3, label=f"trained at {steps}")
        panel.set(xscale="log", title=method, xlabel="steps at evaluation")
        panel.set_xticks(list(EVALUATED), [str(n) for n in EVALUATED])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[0].set_ylabel("objective short of its optimum, %")
    panels[-1].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
