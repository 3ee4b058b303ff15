"""Published experiments on utilities of the whole law (arXiv 2511.22640), over seeds, beside the laws that are known exactly.

    python benchmarks/utilities.py transport entropy --seeds 5 --processes 2 --output runs/utilities

Trains the shipped recipes and variants of them, each seed of each recipe in a folder of --output and a process of its own, by
one thread; started again, it goes on with the seeds that are missing, and those whose measures.json is there need nothing else.
Prints a table for each experiment, mean ± standard deviation over the seeds, in Markdown, and writes utilities.json. A row
without a deviation is exact, by quadrature, or says of how many samples it is.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import tiltflow
from tiltflow.evaluation.distances import distance_to_law
from tiltflow.evaluation.tails import best_share, worst_share
from tiltflow.files import read_json, write_json
from tiltflow.laws import utility_optimum
from tiltflow.laws.law import Array
from tiltflow.runs.recipe import find_recipe, read_recipe, read_recipe_tree
from tiltflow.runs.run import run
from tiltflow.runs.staged.recipe import StagedRecipe
from tiltflow.runs.staged.run import run_stages
from tiltflow.streams import stream
from tiltflow.utilities.estimation import transport as plans
from tiltflow.utilities.kl import Kl

Numbers = dict[str, float]
Found = Numbers | Sequence[Numbers] | Sequence[Future[Numbers]]
"""Of a law that is known, or of seeds that are measured or will be."""
Measure = Callable[[Tensor, Any, Any, int], Numbers]
"""(samples of a trained model, the model, its base, seed) -> what is measured of them."""
MEASURES, EVALUATION = "measures.json", 1000
"""What was measured of a seed; the first seed of the samples for it."""
ROUNDS = 2
"""Sets of samples that what is random in an exact law is averaged over."""


@dataclass(frozen=True)
class Runs:
    """Where runs lie, for how many seeds they are made, and by which processes."""

    folder: Path
    seeds: int
    processes: Executor

    def measured(self, name: str, tree: Mapping[str, Any], measure: Measure, num_samples: int) -> list[Future[Numbers]]:
        """Of each seed of a recipe, once it is there: what `measure`, of a module, finds in samples of the trained model, drawn
        as its evaluation draws them, and what training took."""
        known = self.folder / name / "recipe.json"
        if known.exists() and read_json(known) != tree:
            raise SystemExit(f"{known}: was of another recipe; remove {known.parent}, or give another --output")
        known.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, tree)
        return [self.processes.submit(of_seed, known.parent, seed, tree, measure, num_samples) for seed in range(self.seeds)]


def of_seed(parent: Path, seed: int, tree: Mapping[str, Any], measure: Measure, num_samples: int) -> Numbers:
    """What is measured of a seed of a recipe; of what is there nothing is made again."""
    torch.set_num_threads(1)
    folder = parent / f"seed-{seed}"
    if not (folder / MEASURES).exists():
        own = read_recipe({**tree, "seed": seed}, parent.name)
        if not (folder / "summary.json").exists():
            train(own, folder)
        model = tiltflow.load(folder)
        x = model.sample(num_samples, seed=EVALUATION + seed, batch_size=num_samples)
        write_json(folder / MEASURES, measure(x, model, own.source.load("cpu"), seed) | cost(folder))
    found: Numbers = read_json(folder / MEASURES)
    print(f"{parent.name}, seed {seed}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()), flush=True)
    return found


def train(recipe: Any, folder: Path) -> None:
    """Run a recipe; what an earlier attempt has left in its folder is removed."""
    if folder.exists():
        shutil.rmtree(folder)
    if isinstance(recipe, StagedRecipe):
        run_stages(recipe, folder)
    else:
        run(recipe, folder)


def cost(folder: Path) -> Numbers:
    """What a run took, or all of its stages."""
    stages = sorted(folder.glob("stage-*/summary.json")) or [folder / "summary.json"]
    summaries = [read_json(path) for path in stages]
    return {name: sum(each[name] for each in summaries) for name in ("network_evaluations", "samples_drawn", "seconds")}


@dataclass(frozen=True)
class Table:
    """Rows of numbers: of seeds, or of a law that is known."""

    title: str
    columns: Mapping[str, str]
    """Title of each column by the name of its number."""
    rows: Mapping[str, Found]

    def settled(self) -> Table:
        """With what is measured, once all of it is there."""
        rows = {label: each if isinstance(each, dict) else list(map(settled, each)) for label, each in self.rows.items()}
        return replace(self, rows=rows)

    def lines(self) -> list[str]:
        """In Markdown."""
        heads = f"| | {' | '.join(self.columns.values())} |"
        body = [
            f"| {label} | {' | '.join(cell(numbers, column) for column in self.columns)} |"
            for label, numbers in self.rows.items()
        ]
        return [f"### {self.title}", "", heads, "|" + "---|" * (len(self.columns) + 1), *body, ""]


def settled(found: Numbers | Future[Numbers]) -> Numbers:
    return found.result() if isinstance(found, Future) else found


def cell(numbers: Found, column: str) -> str:
    """A number, or the mean and standard deviation of those of the seeds."""
    each = [numbers] if isinstance(numbers, dict) else map(settled, numbers)
    values = [row[column] for row in each if column in row]
    if not values:
        return ""
    mean, digits = statistics.mean(values), 3 if abs(statistics.mean(values)) < 1 else 2
    if abs(mean) >= 1000:
        return f"{mean:.2e}"
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def recipe(name: str, *changes: str) -> dict[str, Any]:
    """A shipped recipe with settings changed."""
    return read_recipe_tree(find_recipe(name, "train"), changes)


@dataclass(frozen=True)
class Plane:
    """A law on the middles of the cells of a square."""

    points: Array
    """[n, 2]."""
    masses: Array
    """Their probabilities [n]."""
    side: float
    """Of a cell."""

    @classmethod
    def of(cls, log_density: Callable[[Array], Array], low: float, high: float, cells: int) -> Plane:
        edges = np.linspace(low, high, cells + 1)
        middles = (edges[1:] + edges[:-1]) / 2
        points = np.stack(np.meshgrid(middles, middles, indexing="ij"), -1).reshape(-1, 2)
        return cls(points, np.ones(len(points)) / len(points), edges[1] - edges[0]).tilted(log_density(points))

    def tilted(self, log_tilt: Array) -> Plane:
        """The law proportional to this one times exp(log_tilt)."""
        return Plane(self.points, utility_optimum.tilted(self.masses, log_tilt), self.side)

    def mean(self, values: Array) -> Any:
        """E of values at the points [n, ..]."""
        return self.masses @ values

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, 2], uniform in the cells."""
        which = torch.multinomial(torch.from_numpy(self.masses), count, replacement=True, generator=generator)
        within = torch.rand(count, 2, generator=generator, dtype=torch.float64) - 0.5
        return torch.from_numpy(self.points)[which] + self.side * within


# ---- a reward and a distance of transport ----

CENTRE, SCALE, TILT = 20.75, 2.94, 1.538
"""Of the base N((20.75, 20.75), 2.94^2 I) in two dimensions, and the temperature of its plain tilt; all else is in units of y =
(x - 20.75) / 2.94."""
METRICS = {"A": (1.0, 7.0), "B": (7.0, 1.0)}
WEIGHTS = ((0.1, 6.666), (0.073, 7.5), (0.068, 7.6))
"""Weights of W1, and the temperature of a stage at which E r is about that of the plain tilt: the published weight; one at
which W1 is less than half of the plain tilt's; one at which the ratio of the shifts is the published one."""


def transport(runs: Runs) -> Table:
    """E |x| - w W1 to the base, by the same stages with exact potentials between samples, and with none of it."""
    tree = recipe("transport-w1")
    plain = {key: value for key, value in tree.items() if key not in ("utility", "stages")}
    plain["method"] = {**tree["method"], "beta": TILT}
    plain["training"] = {**tree["training"], "max_train_steps": 400}
    base = Plane.of(lambda y: -np.square(y).sum(1) / 2, -6, 9, 160)
    length = np.linalg.norm(SCALE * base.points + CENTRE, axis=1)
    rows: dict[str, Found] = {
        "base, exact": of_transport(base),
        f"tilt at {TILT}, exact": of_transport(base.tilted(length / TILT)),
        f"tilt at {TILT}, trained": runs.measured("transport-tilt", plain, measure_transport, 4000),
    }
    count, samples = tree["stages"]["count"], tree["stages"]["num_samples"]
    for weight, beta in WEIGHTS:
        for name, metric in METRICS.items():
            own = tree | {"utility": regularised(metric, weight), "method": {**tree["method"], "beta": beta}}
            laws = [exact_stages(base, length, metric, weight, count, beta, samples, seed) for seed in range(ROUNDS)]
            label, folder = f"{weight:g} W1, metric {name}", f"transport-{weight:g}-{name.lower()}"
            rows[f"{label}, exact"] = [of_transport(law) for law in laws]
            rows[f"{label}, trained"] = runs.measured(folder, own, measure_transport, 4000)
    columns = {
        "reward": "E r", "w1_a": "W1 of A", "w1_b": "W1 of B", "w1_a_floor": "floor of A", "w1_b_floor": "floor of B",
        "across": "mean shift, horizontal", "up": "vertical", "ratio": "their ratio",
        "network_evaluations": "network evaluations",
    }  # fmt: skip
    return Table(f"E r - w W1, r = |x|; W1 exact between {PAIRS} samples", columns, rows)


PAIRS = 1000


def regularised(metric: tuple[float, ...], weight: float) -> dict[str, Any]:
    """E r - weight W1, for a metric of x, in units of y."""
    distance = {"name": "wasserstein-1", "metric": [SCALE * each for each in metric]}
    terms = [{"utility": "expected-reward", "weight": 1.0}, {"utility": distance, "weight": weight}]
    return {"name": "sum", "utilities": terms}


def exact_stages(
    base: Plane, length: Array, metric: tuple[float, ...], weight: float, count: int, beta: float, samples: int, seed: int
) -> Plane:
    """p_k proportional to p_{k-1} exp((r - weight f_k) / beta) on the plane, f_k the potential between samples of p_{k-1} and
    the base: what stages without an error of training come to."""
    law, scaled, generator = base, tuple(SCALE * each for each in metric), stream(seed, "exact stages")
    points, even = torch.from_numpy(base.points), torch.full((samples,), 1 / samples, dtype=torch.float64)
    for _ in range(count):
        _, potential = plans.solve(law.sample(samples, generator), even, base.sample(samples, generator), scaled, 1)
        f = np.concatenate([potential(some).numpy() for some in points.split(4000)])
        law = law.tilted((length - weight * f) / beta)
    return law


def of_transport(law: Plane) -> Numbers:
    """What `measure_transport` measures, of a law that is known."""
    x = SCALE * law.points + CENTRE
    across, up = law.mean(x) - CENTRE
    exact = {"reward": float(law.mean(np.linalg.norm(x, axis=1))), "across": float(across), "up": float(up)}
    moved = math.hypot(across, up) > 0.01
    some = (SCALE * law.sample(PAIRS, stream(0, "pairs"))).numpy()
    return exact | ({"ratio": float(across / up), **distances(some, 0)} if moved else {})


def measure_transport(y: Tensor, model: Any, base: Any, seed: int) -> Numbers:
    """Of samples [n, 2] in units of y."""
    x = SCALE * y.double().numpy()
    across, up = x.mean(0)
    reward = float(np.linalg.norm(x + CENTRE, axis=1).mean())
    return {"reward": reward, "across": across, "up": up, "ratio": across / up, **distances(x[:PAIRS], seed)}


def distances(x: Array, seed: int) -> Numbers:
    """W1 between x [n, 2], moved to the base's mean 0, and as many samples of the base, in both metrics; and the floor, that of
    two samples of the base."""
    first, second = SCALE * torch.randn(2, len(x), 2, generator=stream(seed, "base"), dtype=torch.float64).numpy()
    found: Numbers = {}
    for name, metric in METRICS.items():
        found |= {f"w1_{name.lower()}": w1(x, first, metric), f"w1_{name.lower()}_floor": w1(second, first, metric)}
    return found


def w1(x: Array, y: Array, metric: tuple[float, ...]) -> float:
    """The mean of |A (x_i - y_j)| over the best assignment."""
    costs = np.linalg.norm((x[:, None] - y) * np.asarray(metric), axis=2)
    return float(costs[linear_sum_assignment(costs)].mean())


# ---- spread at a price ----

ALPHAS = (1.0, 0.5, 0.2)
HALF, CELLS, DRAWN = 6.0, 200, 3000
"""Histograms of 3000 samples, in 200 x 200 cells on [-6, 6]^2; their entropy depends on how many there are."""


def entropy(runs: Runs) -> Table:
    """H - alpha KL: of a Gaussian at several alpha, whose variance becomes (1 + alpha) / alpha of what it was, of two ellipses,
    and without a price, where there is no optimum."""
    tree = recipe("explore-entropy")
    gaussian = {"name": "mixture", "means": [[0.0, 0.0]], "hidden": 64, "layers": 2}
    cases = [(f"N(0, I), alpha {alpha:g}", gaussian, alpha, 2, 1 + alpha, 300) for alpha in ALPHAS]
    cases += [("ellipses, alpha 0.5", tree["model"], 0.5, 1, 1.5, 1000), ("ellipses, alpha 0", tree["model"], 0.0, 4, 4.0, 150)]
    rows: dict[str, Found] = {}
    for label, model, alpha, count, beta, steps in cases:
        base = Plane.of(log_mixture(model), -16, 16, 640)
        cells = base.side**2
        best = None
        if alpha > 0:
            best = Plane(base.points, utility_optimum.of_entropy(base.masses, cells, alpha).masses, base.side)
        own = tree | {"model": model, "stages": {**tree["stages"], "price": alpha, "count": count}}
        own["method"] = {**tree["method"], "beta": beta}
        own["training"] = {**tree["training"], "max_train_steps": steps}
        rows |= {f"{label}: base": of_spread(base, base)}
        rows |= {f"{label}: optimum": of_spread(best, base)} if best is not None else {}
        name = "entropy-" + label.replace("N(0, I)", "gaussian").replace(", alpha ", "-")
        rows[f"{label}: trained"] = runs.measured(name, own, partial(measure_spread, best), 50_000)
    columns = {
        "entropy": f"entropy of {DRAWN} samples", "across": "variance, x1", "up": "variance, x2", "kl": "KL to the base",
        "distance": "sliced W2 to the optimum", "floor": "floor", "network_evaluations": "network evaluations",
    }  # fmt: skip
    return Table("entropy - alpha KL", columns, rows)


def log_mixture(model: Mapping[str, Any]) -> Callable[[Array], Array]:
    """The log density of a mixture, up to a constant."""
    means = np.asarray(model["means"], float)
    scales = np.broadcast_to(np.asarray(model.get("scale", 1.0), float), means.shape)
    weights = np.asarray(model.get("weights", np.ones(len(means))), float)

    def log_density(points: Array) -> Array:
        z = (points[:, None] - means) / scales
        return np.asarray(np.logaddexp.reduce(np.log(weights / scales.prod(1)) - np.square(z).sum(2) / 2, axis=1))

    return log_density


def of_spread(law: Plane, base: Plane) -> Numbers:
    """What `measure_spread` measures, of a law that is known."""
    variance = law.mean(np.square(law.points)) - law.mean(law.points) ** 2
    histograms = [histogram_entropy(law.sample(DRAWN, stream(i, "histogram")).numpy()) for i in range(ROUNDS)]
    kl = utility_optimum.kl(law.masses, base.masses)
    return {"entropy": statistics.mean(histograms), "across": variance[0], "up": variance[1], "kl": kl}


def measure_spread(best: Plane | None, x: Tensor, model: Any, first: Any, seed: int) -> Numbers:
    """Of samples [n, 2], beside the optimum if there is one."""
    variance = x.double().var(0).tolist()
    found = {"entropy": histogram_entropy(x[:DRAWN].numpy()), "across": variance[0], "up": variance[1]}
    if best is not None:
        generator = stream(seed, "optimum")
        own = distance_to_law(x[:DRAWN], best.sample, generator, directions=stream(seed, "directions"))
        found |= {"distance": own.distance, "floor": own.floor}
    return found | {"kl": kl_to_base(model, first, seed)}


def kl_to_base(model: Any, base: Any, seed: int) -> float:
    """KL of a model from the base, both densities by the ODE."""
    law = tiltflow.OfLaw(Kl(), num_samples=1000, sampling=model.sampling)
    value = law.known_value(law.known(model, base, (), seed))
    assert value is not None
    return -value.value


def histogram_entropy(x: Array) -> float:
    """In nats."""
    edges = np.linspace(-HALF, HALF, CELLS + 1)
    counts = np.histogram2d(x[:, 0], x[:, 1], bins=[edges, edges])[0].ravel()
    shares = counts[counts > 0] / counts.sum()
    return float(-shares @ np.log(shares))


# ---- tails: seeking novelty, and avoiding risk ----

TAIL, LINE = 0.01, np.linspace(-7.0, 8.0, 60_001)
"""The share of a tail; points of the first coordinate, as the narrowest law of it has a standard deviation of 0.008."""
NORMAL = np.exp(-(LINE**2) / 2) / np.exp(-(LINE**2) / 2).sum()
PUBLISHED = {
    "novelty": "published, of a landscape of its own: base 59.6, adjoint matching 56.7 ± 2.7, two iterations 452.5 ± 250.0",
    "risk": "published, of a landscape of its own: base 256.8, adjoint matching 225.3 ± 78.9, two iterations 90.0 ± 0.05",
}


@dataclass(frozen=True)
class Landscape:
    """A reward of the first coordinate of N(0, I), and a tail of it.

    Args:
        recipe: the shipped recipe that seeks it, or avoids it.
        best: whether the tail is the best hundredth, or the worst.
        edges: the masses below the first and above the second are measured.
    """

    recipe: str
    best: bool
    edges: tuple[float, float]

    def reward(self, s: Tensor) -> Tensor:
        """[n] -> [n]."""
        own = read_recipe(recipe(self.recipe), self.recipe)
        assert isinstance(own, StagedRecipe)
        found: Tensor = own.rewards["reward"].build()(s[:, None])
        return found

    def optimum(self, alpha: float) -> Array:
        """Of the mean of the tail less alpha KL, on the line."""
        find = utility_optimum.of_superquantile if self.best else utility_optimum.of_cvar
        return find(NORMAL, self.reward(torch.from_numpy(LINE)).numpy(), TAIL, alpha).masses

    def tilt(self, alpha: float) -> Array:
        """By the reward itself, on the line."""
        return utility_optimum.tilted(NORMAL, self.reward(torch.from_numpy(LINE)).numpy() / alpha)

    def numbers(self, s: Array, masses: Array) -> Numbers:
        """Of a law of points [n] with these masses."""
        r, p = self.reward(torch.from_numpy(s)).double(), torch.from_numpy(masses)
        tail = (best_share if self.best else worst_share)(r, p, TAIL)[0]
        below, above = self.edges
        shares = {"below": float(masses[s < below].sum()), "above": float(masses[s > above].sum())}
        return {"reward": float(p @ r), "tail": tail, **shares}

    def measure(self, best: Array, x: Tensor, model: Any, base: Any, seed: int) -> Numbers:
        """Of samples [n, 2], beside a law on the line."""
        s = x[:, 0].double().numpy()
        drawn = np.random.default_rng(seed).choice(LINE, len(s), p=best)
        found = {"distance": w1_to_line(s, best), "floor": w1_to_line(drawn, best)}
        return self.numbers(s, np.full(len(s), 1 / len(s))) | found


def w1_to_line(s: Array, masses: Array) -> float:
    """W1 between samples [n] and a law on the line."""
    below = np.searchsorted(np.sort(s), LINE, side="right") / len(s)
    return float(np.abs(below - np.cumsum(masses)).sum() * (LINE[1] - LINE[0]))


def of_tail(runs: Runs, landscape: Landscape, title: str, cases: Mapping[str, tuple[float, dict[str, Any]]]) -> Table:
    """The optimum, the plain tilt, and what recipes come to, at the price alpha of each case."""
    rows: dict[str, Found] = {"base, exact": landscape.numbers(LINE, NORMAL)}
    for label, (alpha, tree) in cases.items():
        best = landscape.optimum(alpha)
        rows[f"best at alpha {alpha:g}, exact"] = landscape.numbers(LINE, best)
        rows[f"plain tilt at {alpha:g}, exact"] = landscape.numbers(LINE, landscape.tilt(alpha))
        name = f"{landscape.recipe}-{label.replace(' ', '-').replace(',', '')}"
        rows[f"{label}, trained"] = runs.measured(name, tree, partial(landscape.measure, best), 20_000)
    low, high = landscape.edges
    columns = {
        "reward": "E r", "tail": f"mean of the {'best' if landscape.best else 'worst'} 1 %", "below": f"P(x1 < {low:g})",
        "above": f"P(x1 > {high:g})", "distance": "W1 of x1 to the best", "floor": "floor",
        "network_evaluations": "network evaluations",
    }  # fmt: skip
    return Table(title, columns, rows)


def plain(tree: Mapping[str, Any], alpha: float, steps: int) -> dict[str, Any]:
    """The tilt of the reward itself at alpha, by the method of a recipe of stages."""
    own = {key: value for key, value in tree.items() if key not in ("utility", "stages")}
    own["method"] = {key: value for key, value in tree["method"].items() if key != "pool"} | {"beta": alpha}
    own["training"] = {**tree["training"], "max_train_steps": steps, "train_batch_size": 256}
    return own


def novelty(runs: Runs) -> Table:
    """The mean of the best hundredth."""
    tree, landscape = recipe("novelty-superquantile"), Landscape("novelty-superquantile", True, (-1.5, 3.0))
    cases = {"stages": (1000.0, tree), "plain tilt at 1000": (1000.0, plain(tree, 1000.0, 300))}
    return of_tail(runs, landscape, f"the best hundredth; {PUBLISHED['novelty']}", cases)


def risk(runs: Runs) -> Table:
    """The mean of the worst hundredth, of minus a cost."""
    tree, landscape = recipe("risk-cvar"), Landscape("risk-cvar", False, (-1.0, 2.0))
    cases = {f"one stage at {a:g}": (a, {**tree, "method": {**tree["method"], "beta": a}}) for a in (20.0, 30.0)}
    return of_tail(runs, landscape, f"the worst hundredth, of minus a cost; {PUBLISHED['risk']}", cases)


EXPERIMENTS: dict[str, Callable[[Runs], Table]] = {"transport": transport, "entropy": entropy, "novelty": novelty, "risk": risk}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; by default all")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/utilities"))
    options = parser.parse_args()
    for name in options.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"there is no experiment {name!r}; known: {', '.join(EXPERIMENTS)}")
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as processes:
        runs = Runs(options.output, options.seeds, processes)
        tables = [EXPERIMENTS[name](runs) for name in options.experiments or EXPERIMENTS]
        tables = [table.settled() for table in tables]
    print()
    for table in tables:
        print("\n".join(table.lines()))
    content = {table.title: {"columns": table.columns, "rows": table.rows} for table in tables}
    write_json(options.output / "utilities.json", content)


if __name__ == "__main__":
    main()
