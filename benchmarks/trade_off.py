"""What the penalty of ORW-CFM-W2 trades: reward against diversity and distance to the base, over alpha, beside offline reward
weighting and DDPO with the same number of samples.

    python benchmarks/trade_off.py even  --output docs/orw-even.png        even digits, by a classifier's probability
    python benchmarks/trade_off.py digit --output docs/orw-digit.png       one digit
    python benchmarks/trade_off.py jpeg  --output docs/orw-jpeg.png        small JPEG files

Prints, for each, mean and standard deviation over the seeds, and the reward of the samples of each round. W2 and variance are
in the features of digits-judge. A run takes some two minutes of one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tiltflow.models.model import load
from tiltflow.reports.plots import image_grid
from tiltflow.rewards.jpeg_size import JpegSize
from tiltflow.runs.recipe import Recipe, find_recipe, read_recipe_tree
from tiltflow.runs.run import run
from tiltflow.settings import validate

TASKS: dict[str, tuple[str, list[str]]] = {
    "even": ("digits-even-orw", []),
    "digit": ("digits-even-orw", ["reward.classes=[4]", "evaluation.group=[4]"]),
    "jpeg": ("digits-jpeg-orw", []),
}
ALPHAS = {"even": (0.0, 0.1, 0.3, 1.0), "digit": (0.0, 0.1, 0.3, 1.0), "jpeg": (0.0, 0.1, 0.3, 1.0, 3.0)}
OFFLINE = ["method.alpha=0", "method.online_fraction=0"]
# as many samples as the rounds draw, of the memoryless chain that DDPO needs, one pass over each as published
DDPO = [
    "method={name: score-as-action, preset: ddpo, estimator: return, solver: memoryless, num_inference_steps: 15, shift: 3.0,"
    " clip_range: 0.1, num_passes: 1, train_timesteps: [{count: 5}]}",
    "optimizer={learning_rate: %s}",  # the rest is the preset's
    "training.train_batch_size=64",
    "training.max_train_steps=40",
]


def variants(task: str, ddpo_rate: str) -> dict[str, list[str]]:
    """Name -> overrides of the task's recipe."""
    online = {f"alpha = {alpha:g}": [f"method.alpha={alpha}"] for alpha in ALPHAS[task]}
    ddpo = [DDPO[0], DDPO[1] % ddpo_rate, *DDPO[2:]]
    return {**online, "offline, alpha = 0": OFFLINE, "DDPO": ddpo}


def one(task: str, overrides: list[str], seed: int, keep: Path | None = None) -> dict[str, Any]:
    """Train and evaluate one run, in a folder that is thrown away unless it is to be kept."""
    torch.set_num_threads(1)
    name, changes = TASKS[task]
    tree = read_recipe_tree(find_recipe(name, "train"), [*changes, *overrides, f"seed={seed}"])
    rewards: dict[float, int] = {}
    penalties: list[float] = []

    def watch(record: Any) -> None:
        rewards.setdefault(record.metrics["reward"], record.step)
        penalties.append(record.metrics.get("velocity_distance", float("nan")))

    with tempfile.TemporaryDirectory() as folder:
        summary = run(validate(Recipe, tree, name), keep or Path(folder) / "run", callbacks=[watch])
    return summary | {"rounds": list(rewards), "velocity_distance": statistics.mean(penalties[-20:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--variants", nargs="+", help="only these, for example 'alpha = 0.3'")
    parser.add_argument("--ddpo-rate", default="3e-4", help="DDPO's learning rate")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe, for all")
    parser.add_argument("--output", help="draw the trade-off as a .png")
    parser.add_argument("--pictures", help="draw samples and file sizes of seed 0, before and after, as a .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()

    chosen = {
        name: [*overrides, *options.set]
        for name, overrides in variants(options.task, options.ddpo_rate).items()
        if options.variants is None or name in options.variants
    }
    jobs = [(name, seed) for seed in range(options.seeds) for name in chosen]
    with ProcessPoolExecutor(options.processes) as pool, tempfile.TemporaryDirectory() as folder:
        kept = {name: Path(folder) / str(i) for i, name in enumerate(chosen)} if options.pictures else {}
        futures = {
            (name, seed): pool.submit(one, options.task, chosen[name], seed, kept.get(name) if seed == 0 else None)
            for name, seed in jobs
        }
        found = {job: future.result() for job, future in futures.items()}
        if kept:
            draw_pictures(kept, options.pictures)
    results = {name: [found[name, seed] for seed in range(options.seeds)] for name in chosen}

    first = next(iter(results.values()))[0]
    print(
        f"base: reward {first['reward_base']:.3f}, wanted {share(first, 'base'):.1%}, sure {first['judge']['sure_base']:.1%},"
        f" entropy {first['judge']['entropy_base']:.2f}, variance {first['judge']['variance_base']:.1f},"
        f" W2 between two samples {first['w2_floor']:.2f}"
    )
    print(f"{'':20}{'reward':>18}{'wanted':>18}{'sure':>9}{'entropy':>15}{'variance':>17}{'W2':>15}{'CPU s':>8}")
    for name, runs in results.items():
        print(
            f"{name:20}{spread([r['reward_tuned'] for r in runs], 3):>18}"
            f"{spread([100 * share(r, 'tuned') for r in runs], 1):>18}"
            f"{statistics.mean(r['judge']['sure_tuned'] for r in runs):9.1%}"
            f"{spread([r['judge']['entropy_tuned'] for r in runs], 2):>15}"
            f"{spread([r['judge']['variance_tuned'] for r in runs], 1):>17}{spread([r['w2_base'] for r in runs], 2):>15}"
            f"{statistics.mean(r['seconds'] for r in runs):8.0f}"
        )
    print("\nmean reward of the samples of each round")
    for name, runs in results.items():
        rounds = [statistics.mean(values) for values in zip(*(r["rounds"] for r in runs), strict=False)]
        print(f"{name:20}" + " ".join(f"{value:.3f}" for value in rounds[:15]))
    if options.task == "jpeg":
        print("\nlinear response: gain x alpha should be constant, E|v - v_base|^2 / gain^2 too")
        for alpha in ALPHAS["jpeg"][1:]:
            for r in results.get(f"alpha = {alpha:g}", ()):
                gain, penalty = r["reward_tuned"] - r["reward_base"], r["velocity_distance"]
                print(
                    f"alpha {alpha:<5g} gain {gain:7.1f}  gain x alpha {gain * alpha:7.1f}"
                    f"  penalty {penalty:8.3f}  penalty / gain^2 {penalty / gain**2:.2e}"
                )
    if options.output:
        draw(results, options.task, options.output)
    if options.json:
        print(json.dumps(results))


def share(result: dict[str, Any], which: str) -> float:
    """Of the wanted digits, as the judge sees it."""
    group = result["judge"].get("group")
    return float("nan") if group is None else float(group[which])


def spread(values: list[float], digits: int) -> str:
    if values[0] != values[0]:
        return "-"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.pstdev(values):.{digits}f}"


def draw(results: dict[str, Any], task: str, path: str) -> None:
    """Reward by round, reward against W2, and variety against reward; a dot or a line for each seed."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    online = [name for name in results if name.startswith("alpha")]
    colors = {name: colormaps["viridis"](i / max(len(online), 1)) for i, name in enumerate(online)}
    colors |= {"offline, alpha = 0": "tab:orange", "DDPO": "tab:red"}
    first = next(iter(results.values()))[0]
    for name, runs in results.items():
        for i, r in enumerate(runs):
            look: dict[str, Any] = {"color": colors[name], "label": name if i == 0 else None}
            samples = [(64 if name == "DDPO" else 256) * (j + 1) for j in range(len(r["rounds"]))]
            panels[0].plot(samples, r["rounds"], alpha=0.8, **look)
            panels[1].plot(r["w2_base"], r["reward_tuned"], "o", **look)
            panels[2].plot(r["judge"]["variance_tuned"], r["reward_tuned"], "o", **look)
    panels[1].axvline(first["w2_floor"], color="grey", linestyle="--", linewidth=1)
    panels[2].axvline(first["judge"]["variance_base"], color="grey", linestyle="--", linewidth=1)
    panels[0].set(xlabel="samples drawn", ylabel="mean reward")
    panels[1].set(xlabel="W2 to the base, judge's features (dashed: floor)", ylabel="mean reward, tuned")
    panels[2].set(xlabel="variance of the judge's features (dashed: base)", ylabel="mean reward, tuned")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle({"even": "even digits", "digit": "one digit", "jpeg": "small JPEG files"}[task])
    figure.savefig(path, dpi=120)


def draw_pictures(runs: dict[str, Path], path: str) -> None:
    """Samples of the base and of each run, and the sizes of their JPEG files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * (len(runs) + 1), 5), layout="constrained")
    FigureCanvasAgg(figure)
    size = JpegSize(quality=95, sign="larger").build()
    panels = figure.subplots(2, len(runs) + 1, sharex="row", sharey="row", squeeze=False)
    recipe = validate(Recipe, read_recipe_tree(next(iter(runs.values())) / "recipe.yaml", []), "run")
    models = {"base": load(recipe.model), **{name: load(folder / "model") for name, folder in runs.items()}}
    for column, (name, model) in zip(panels.T, models.items(), strict=True):
        x = model.sample(512, seed=0, sampling=recipe.sampling)
        column[0].imshow(image_grid(x[:64], 8), cmap="gray")
        column[0].set(title=name, xticks=[], yticks=[])
        column[1].hist(size(x).tolist(), bins=range(340, 1000, 20), color="tab:blue")
        column[1].set(xlabel="JPEG file, bytes")
        column[1].grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
