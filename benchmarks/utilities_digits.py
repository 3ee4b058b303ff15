"""Utilities on pictures: the recipes digits-novelty and digits-explore, beside the laws that are best, from weights.

    python benchmarks/utilities_digits.py --folder runs/utilities --seeds 5 --processes 2
    python benchmarks/utilities_digits.py --folder runs/utilities --seeds 5 --device cuda --output docs/utilities-digits.png

Samples of the base, with weights, are the best law itself, of which an effective number is left: of the superquantile with the
threshold of `laws.tail_duals`, of the optimal design with M of its `one_shot`. So is the plain tilt by the reward that has the
same superquantile. Beside them stand the models that the recipes train, one a seed: mean and standard deviation over the seeds.
The judge, which no recipe trains with, says how sure it is, of which digits, and how they differ.

What the folder has is not made again: a run that was cut off goes on. Some four minutes a run on two cores,
and two for the base. Each run is a process, of which --processes go at a time. The rows are written to digits.json as well.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate, entropy, one_hot
from tiltflow.evaluation.tails import best_share
from tiltflow.files import read_json, write_json
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.laws.law import Array
from tiltflow.laws.utility_optimum import kl, of_superquantile, tilted
from tiltflow.models.model import load
from tiltflow.models.model_folder import load_classifier
from tiltflow.rewards.stroke_thickness import thickness
from tiltflow.runs.recipe import find_recipe, read_recipe, read_recipe_tree
from tiltflow.runs.staged.recipe import StagedRecipe
from tiltflow.runs.staged.results import load_last
from tiltflow.runs.staged.run import run_stages
from tiltflow.streams import stream
from tiltflow.utilities.estimation.known import Known
from tiltflow.utilities.estimation.scores import Score
from tiltflow.utilities.optimal_design import OptimalDesign
from tiltflow.utilities.superquantile import Superquantile

Run = tuple[str, str, int, list[str]]
"""Title, recipe, seed and settings."""
BASE, SAMPLES, PART = 8192, 2048, 512
"""Samples of the base, of each model, and of a file of them."""
DIRECTIONS = 50
"""Principal directions of the digits for the entropy's gradient."""
ENTROPY = (
    "utility={name: entropy}",
    "stages={count: 1, base: first, num_samples: 512}",
    "method={name: adjoint-matching, beta: 20, num_inference_steps: 15, shift: 3.0, num_passes: 2}",
    "method.train_timesteps=[{count: 4}]",
    "optimizer={learning_rate: 4e-4, lr_scheduler: cosine, adam_beta2: 0.99}",
    "training={max_train_steps: 32, train_batch_size: 48, ema_decay: 0.9, mixed_precision: auto}",
    "sampling={solver: memoryless, num_inference_steps: 15, shift: 3.0}",
)
"""What makes of digits-explore one stage of Adjoint Matching for the entropy of the pixels, from scores at t = 0.98."""
NOVELTY, EXPLORE, SHARE = "digits-novelty", "digits-explore", 0.1


def recipe_of(name: str, seed: int, overrides: Sequence[str] = ()) -> StagedRecipe:
    tree = read_recipe_tree(find_recipe(name, "train"), [*overrides, f"seed={seed}"])
    recipe = read_recipe({**tree, "training": {**tree["training"], "resume_from_checkpoint": "latest"}}, name)
    assert isinstance(recipe, StagedRecipe)
    return recipe


def drawn(model: Any, count: int, folder: Path, seed: int) -> Tensor:
    """Samples of a model, in files of their own."""
    parts = []
    for i in range(count // PART):
        path = folder / f"samples-{i:02d}.npy"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            np.save(path, model.sample(PART, seed=stream(seed, "benchmark", i).initial_seed()).cpu().numpy())
        parts.append(torch.from_numpy(np.load(path)))
    return torch.cat(parts)


def train(folder: Path, device: str, run: Run) -> Path:
    """Train a recipe, and draw from its model, what of it is missing. Returns its folder."""
    title, name, seed, settings = run
    recipe, own = recipe_of(name, seed, settings), folder / f"{title}-{seed}"
    if not (own / "summary.json").exists():
        print(f"{own.name} ..", flush=True)
        run_stages(recipe, own, device=device)
    drawn(load_last(own, device), SAMPLES, samples_of(own), seed)
    return own


def samples_of(run: Path) -> Path:
    return run.with_name(f"{run.name}-samples")


@dataclass(frozen=True)
class Judged:
    """What the judge sees of samples [n]: probabilities of classes, and features of length 1."""

    probabilities: Tensor
    features: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor) -> Judged:
        judge: Any = load_classifier("digits-judge")[0]
        found = [(judge(part).softmax(1), judge.features(part)) for part in x.split(PART)]
        p, f = (torch.cat(each).double() for each in zip(*found, strict=True))
        return cls(p, torch.nn.functional.normalize(f, dim=1))


def measured(x: Tensor, judged: Judged, weights: Array | None, base: Tensor | None, utility: OptimalDesign) -> dict[str, Any]:
    """The numbers of a law: estimates with their errors, from samples with weights."""
    reward = {"reward": thickness}
    known = Known(x, weights=None if weights is None else torch.from_numpy(weights), reward=reward)
    r, p = known.values("reward"), known.p
    sure = (judged.probabilities.amax(1) > 0.9).double()
    in_tail = (r >= best_share(r, p, SHARE)[1]).double() * p
    classes = p @ one_hot(judged.probabilities.argmax(1), 10)
    kernel = judged.features.T @ (p[:, None] * judged.features)  # has the eigenvalues of the similarities of all samples
    return {
        "superquantile": Superquantile(share=SHARE).value(known),
        "mean": known.estimate(float(p @ r), r),
        "log det": utility.value(known),
        "sure": known.estimate(float(p @ sure), sure),
        "sure in the tail": float(in_tail @ sure / in_tail.sum()),
        "classes": classes,
        "of classes": float((classes - (classes if base is None else base)).abs().sum() / 2),
        "entropy of classes": entropy(classes),
        "vendi": float(torch.special.entr(torch.linalg.eigvalsh(kernel).clamp(min=0)).sum().exp()),
        "effective": 1 / float(p.square().sum()),
    }


def superquantile_of(p: Array, r: Array) -> float:
    order = np.argsort(-r)
    return float(np.diff(np.minimum(p[order].cumsum(), SHARE), prepend=0) @ r[order]) / SHARE


def best_laws(x: Tensor, novelty: StagedRecipe, explore: StagedRecipe) -> dict[str, Array]:
    """Weights of samples of the base: of the laws that the recipes aim at, and of the plain tilt that reaches as much."""
    with torch.no_grad():
        r = thickness(x).double().numpy()
    base = np.full(len(r), 1 / len(r))
    best = of_superquantile(base, r, SHARE, novelty.alpha).masses
    goal = superquantile_of(best, r)
    steepest = 1 / (SHARE * novelty.alpha)  # the slope of the best law's tilt in its tail
    inverse = brentq(lambda b: superquantile_of(tilted(base, b * r), r) - goal, 0, steepest)
    assert isinstance(explore.utility, OptimalDesign)
    other = 2 * base * (np.arange(len(r)) >= len(r) // 2)  # what a design is worth shows on samples that it was not found on
    design = explore.utility.one_shot(Known(x[: len(x) // 2]), explore.alpha)
    with torch.no_grad():
        g = torch.cat([design(part) for part in x.split(PART)]).double().numpy()
    return {
        "base": base,
        f"{NOVELTY}, best law": best,
        "plain tilt": tilted(base, inverse * r),
        f"{EXPLORE}, best law": tilted(other, g / explore.alpha),
    }


def directions(x: Tensor) -> None:
    """Where the gradient of the entropy, minus the score, points: how much of it is along the principal directions of the
    digits, and how long it is beside the score of white noise of the standard deviation at which it is asked."""
    flat = x.flatten(1)
    _, _, v = torch.linalg.svd(flat[:4096] - flat.mean(0), full_matrices=False)
    main, flow = v[:DIRECTIONS].T, load("digits-flow").flow
    of_data = ((flat - flat.mean(0)) @ main).var(0).sum() / flat.var(0).sum()
    print(f"{DIRECTIONS} of {flat.shape[1]} directions have {of_data:.0%} of the variance of the digits, and of white noise"
          f" {DIRECTIONS / flat.shape[1]:.1%}")  # fmt: skip
    print("\n| eps | noise | score x noise, a pixel | share in them |\n|---|---|---|---|")
    for eps in (0.02, 0.1, 0.3, 0.5):
        with eval_mode(flow.network):
            s = Score(flow, 1 - eps)(x[:64]).flatten(1)
        std = eps / (1 - eps)
        share = ((s @ main).square().sum(1) / s.square().sum(1)).mean()
        print(f"| {eps:g} | {std:.3f} | {std * s.square().mean(1).sqrt().mean():.2f} | {share:.1%} |")


def cell(values: Sequence[Any], digits: int, form: Callable[[float], float] = lambda x: x) -> str:
    """A number with its error: of one estimate its own, of several the standard deviation over the seeds."""
    if None in values:
        return ""  # as the KL of paths that have none
    numbers = [form(each.value if isinstance(each, Estimate) else each) for each in values]
    if len(numbers) > 1:
        return f"{statistics.mean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"
    error = form(values[0].standard_error) if isinstance(values[0], Estimate) else None
    return f"{numbers[0]:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    columns: dict[str, tuple[str, int, Callable[[float], float]]] = {
        "best 10 %": ("superquantile", 2, lambda x: x),
        "mean": ("mean", 2, lambda x: x),
        "log det": ("log det", 1, lambda x: x),
        "Vendi": ("vendi", 2, lambda x: x),
        "sure, %": ("sure", 1, lambda x: 100 * x),
        "in the best 10 %": ("sure in the tail", 0, lambda x: 100 * x),
        "classes moved, %": ("of classes", 1, lambda x: 100 * x),
        "entropy of classes": ("entropy of classes", 3, lambda x: x),
        "KL, nats": ("kl", 2, lambda x: x),
        "samples": ("effective", 0, lambda x: x),
    }
    print("\n| law | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, found in rows.items():
        cells = [cell([each[key] for each in found], digits, form) for key, digits, form in columns.values()]
        print(f"| {name} | " + " | ".join(cells) + " |")


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as numbers: estimates as value and standard error."""
    numbers = {key: [each.value, each.standard_error] if isinstance(each, Estimate) else each for key, each in row.items()}
    return {key: each.tolist() if isinstance(each, Tensor) else each for key, each in numbers.items()}


def drawn_by(weights: Array, x: Tensor, seed: int = 0) -> Tensor:
    """Different samples of a weighted law, as far as there are some."""
    return x[torch.multinomial(torch.from_numpy(weights), 400, generator=stream(seed, "pictures"))]


def draw(path: str, laws: Mapping[str, Tensor]) -> None:
    """A panel a law: twenty of its best tenth, and below samples as they come."""
    from PIL import Image, ImageDraw

    from tiltflow.reports.plots import image_grid

    panels = []
    for title, x in laws.items():
        with torch.no_grad():
            best = x[thickness(x).topk(int(SHARE * len(x))).indices]
        best = best[torch.linspace(0, len(best) - 1, 20).long()]  # from the very best to the last of them
        above, below = (image_grid(each, 10, scale=1) for each in (best, x[:40]))
        panel = Image.new("L", (above.width, 20 + above.height + 6 + below.height), 255)
        ImageDraw.Draw(panel).text((2, 2), title, fill=0, font_size=14)
        panel.paste(above, (0, 20))
        panel.paste(below, (0, 20 + above.height + 6))
        panels.append(panel)
    width, height = panels[0].width + 12, panels[0].height + 8
    picture = Image.new("L", (3 * width - 12, -(-len(panels) // 3) * height - 8), 255)
    for i, panel in enumerate(panels):
        picture.paste(panel, (i % 3 * width, i // 3 * height))
    picture.quantize(16).save(path, optimize=True)  # 16 greys: a quarter of the file


def digits(
    folder: Path, seeds: int, overrides: Sequence[str] = (), output: str | None = None, processes: int = 1, device: str = "cpu"
) -> None:
    """Train what is missing, print the tables, and draw the picture where it is asked for."""
    runs: list[Run] = [(name, name, seed, list(overrides)) for seed in range(seeds) for name in (NOVELTY, EXPLORE)]
    runs += [("entropy", EXPLORE, 0, [*overrides, *ENTROPY])]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        trained = list(pool.map(partial(train, folder, device), runs))
    novelty, explore = (recipe_of(name, 0, overrides) for name in (NOVELTY, EXPLORE))
    assert isinstance(explore.utility, OptimalDesign)
    base_model = replace(load("digits-flow", device=device), sampling=novelty.evaluation.first.sampling)
    x = drawn(base_model, BASE, folder / "base", 0)
    directions(x)
    judged, laws = Judged.of(x), best_laws(x, novelty, explore)
    rows, of_base = dict[str, list[dict[str, Any]]](), None
    for name, p in laws.items():
        beside = laws["base"] * (p > 0)
        rows[name] = [measured(x, judged, p, of_base, explore.utility) | {"kl": kl(p, beside / beside.sum())}]
        of_base = rows["base"][0]["classes"]
    pictures = {name: x if name == "base" else drawn_by(p, x) for name, p in laws.items()}
    for (title, _, seed, _), own in zip(runs, trained, strict=True):
        y = drawn(load_last(own, device), SAMPLES, samples_of(own), seed)
        row = measured(y, Judged.of(y), None, of_base, explore.utility) | {"kl": read_json(own / "summary.json")["path_kl"]}
        rows.setdefault(f"{title}, trained", []).append(row)
        pictures.setdefault(f"{title}, trained", y)
    write_json(folder / "digits.json", {name: [plain(each) for each in found] for name, found in rows.items()})
    table(rows)
    if output is not None:
        best = (f"{name}, best law" for name in (NOVELTY, EXPLORE))
        order = ("base", f"{NOVELTY}, trained", f"{EXPLORE}, trained", "plain tilt", *best)
        draw(output, {name: pictures[name] for name in order})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where runs and samples are kept")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--device", default="cpu", help="where they train")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override both recipes")
    parser.add_argument("--output", help="PNG file of the picture")
    options = parser.parse_args()
    digits(options.folder, options.seeds, options.set, options.output, options.processes, options.device)


if __name__ == "__main__":
    main()
