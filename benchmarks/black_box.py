"""Score as Action beside DDPO on a reward without a gradient: the recipe digits-png, the same network evaluations.

    python benchmarks/black_box.py --output docs/black-box.png

DDPO has no leash, so its learning rate, --rate, is chosen such that it ends at the same path KL (5e-6: at the same reward).
Prints, for each, after training: reward and path KL of the chain that was trained, from fresh trajectories; size of the files
sampled with the recipe's sampler, and the share of them that the judge is sure of. Mean and standard deviation over the seeds.
Some 30 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from tiltflow.api import steps
from tiltflow.flows.adapter import base_of
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.models.model import load
from tiltflow.models.model_folder import load_classifier
from tiltflow.runs.recipe import Recipe, find_recipe, read_recipe_tree
from tiltflow.settings import validate
from tiltflow.streams import stream

FRESH = 1024
# standardised rewards and PPO's clip, on the same chain; the published clip of 1e-4 is on means over dimensions
DDPO = [
    "method.preset=ddpo",
    "method.estimator=return",
    "method.solver=memoryless",
    "method.clip_range=0.1",
    "optimizer.lr_scheduler=cosine",
    "optimizer.learning_rate={rate}",
]
METHODS: dict[str, list[str]] = {"score-as-action": [], "ddpo": DDPO}


@torch.no_grad()
def fresh(method: ScoreAsAction, tuned: Any, base: Any, reward: Any, x: torch.Tensor, generator: torch.Generator) -> Any:
    """Mean reward and path KL of the trained chain from fresh trajectories."""
    path, end = method.rollout(tuned, base, x, generator)
    kl = sum(
        energy / 2 * (v - base(y, t)).flatten(1).square().sum(1).mean().item()
        for y, v, t, energy in zip(path.states, path.velocities, path.chain.times, path.chain.energy.tolist(), strict=False)
    )
    return reward(end).mean().item(), kl


def run(name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Train and measure one run."""
    torch.set_num_threads(1)
    tree = read_recipe_tree(find_recipe("digits-png", "train"), [*overrides, f"seed={seed}"])
    recipe = validate(Recipe, tree, name)
    base, reward = load(recipe.model), recipe.reward.build()
    tuned, records = steps(base, reward, recipe.method, recipe.training, optimizer=recipe.optimizer, seed=seed)
    curve = [
        (record.network_evaluations, record.metrics["reward"], record.metrics["path_kl"], record.seconds) for record in records
    ]
    generator = stream(seed, "fresh")
    reached, kl = fresh(recipe.method, tuned.flow, base_of(base.flow), reward, base.start(FRESH, generator), generator)
    before, _ = fresh(recipe.method, base.flow, base_of(base.flow), reward, base.start(FRESH, generator), generator)
    judge, _ = load_classifier("digits-judge")
    samples = {which: m.sample(FRESH, seed=seed, sampling=recipe.sampling) for which, m in (("base", base), ("tuned", tuned))}
    with torch.no_grad():
        sure = {which: (judge(x).softmax(1).amax(1) > 0.5).float().mean().item() for which, x in samples.items()}
    return {
        "curve": curve,
        "gain": reached - before,
        "path_kl": kl,
        "bytes": {which: -reward(x).mean().item() for which, x in samples.items()},
        "sure": sure,
        "seconds": curve[-1][-1],
        "network_evaluations": curve[-1][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--rate", type=float, default=3e-6, help="DDPO's learning rate")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe, for both")
    parser.add_argument("--output", help="draw the curves as a .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()

    jobs = [(name, seed) for seed in range(options.seeds) for name in options.methods]
    settings = [[*(key.format(rate=options.rate) for key in METHODS[name]), *options.set] for name, _ in jobs]
    with ProcessPoolExecutor(options.processes) as pool:
        found = dict(zip(jobs, pool.map(run, *zip(*jobs, strict=True), settings), strict=True))

    results = {name: [found[name, seed] for seed in range(options.seeds)] for name in options.methods}
    print(f"{'':17}{'evaluations':>12}{'gain, bytes':>18}{'path KL':>16}{'file, bytes':>26}{'judge is sure':>24}{'CPU s':>8}")
    for name, runs in results.items():
        print(
            f"{name:17}{runs[0]['network_evaluations']:12}{spread([r['gain'] for r in runs]):>18}"
            f"{spread([r['path_kl'] for r in runs], 2):>16}"
            f"{statistics.mean(r['bytes']['base'] for r in runs):8.0f} -> {spread([r['bytes']['tuned'] for r in runs]):>14}"
            f"{statistics.mean(r['sure']['base'] for r in runs):8.1%} -> "
            f"{statistics.mean(r['sure']['tuned'] for r in runs):12.1%}"
            f"{statistics.mean(r['seconds'] for r in runs):8.0f}"
        )
    if options.output:
        draw(results, options.output)
    if options.json:
        print(json.dumps(results))


def spread(values: list[float], digits: int = 1) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.pstdev(values):.{digits}f}"


def draw(results: dict[str, Any], path: str) -> None:
    """Reward against evaluations, and against path KL; running means of 10 records, a line a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for (name, runs), color in zip(results.items(), ("tab:blue", "tab:orange"), strict=False):
        for i, run in enumerate(runs):
            smooth = [
                [statistics.mean(row[k] for row in run["curve"][max(j - 9, 0) : j + 1]) for j in range(len(run["curve"]))]
                for k in range(3)
            ]
            label = name if i == 0 else None
            left.plot([n / 1000 for n in smooth[0]], smooth[1], color=color, alpha=0.8, label=label)
            right.plot(smooth[2], smooth[1], color=color, alpha=0.8, label=label)
    left.set(xlabel="network evaluations, thousands", ylabel="mean reward (minus bytes)")
    right.set(xlabel="path KL, nats")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
