"""Distance to the tilted law, by method, number of steps and cost, on problems whose answer is known: the tables and the
figures of docs/exactness.md.

    python benchmarks/exactness.py run --output runs/exactness                 # some hours on two cores; a row a run
    python benchmarks/exactness.py run --cases fixture --methods tilt-matching --steps 15 --seeds 1
    python benchmarks/exactness.py run --processes 12 --time-limit 240        # what is done by then is kept
    python benchmarks/exactness.py table --output runs/exactness
    python benchmarks/exactness.py figures --output runs/exactness --docs docs

Each row is a run of `tiltflow verify`, written to OUTPUT/rows.jsonl as soon as it is done; rows that are there already are not
run again. Jobs run one thread each, those of the first number of steps first, and of these the longest.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tiltflow.errors import TiltflowError
from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import ExactVelocity
from tiltflow.problems.verification.verify import Fitted, Verification, Watch, once, read_verification, verify
from tiltflow.training.trainer import Record


def spread(dimension: int) -> list[str]:
    """Three modes of unequal weights and variances, on three axes of the space."""
    return [
        f"dimension={dimension}",
        "means=[[2],[-1,2],[0,-1,2]]",
        "weights=[.5,.3,.2]",
        "scale=[.4,.6,.8]",
        "linear=[1,.5,.5]",
    ]


CASES: dict[str, list[str]] = {
    "fixture": [
        "dimension=1",
        "means=[[-1.5],[1.5]]",
        "weights=[.6,.4]",
        "scale=[.3872983346,.5477225575]",
        "linear=.8",
        "quadratic=.7",
        "beta=.6",
        "draws=200",
    ],
    "ring": [],
    "3-d": spread(3),
    "16-d": spread(16),
    "64-d": spread(64),
    "ring, strong": ["beta=.171"],  # a tenth of the standard deviation of the reward
    "far modes": ["dimension=1", "means=[[-4],[4]]", "scale=.5", "linear=.25", "beta=1", "draws=200"],
}
"""Overrides of `tiltflow verify mixture`. Shares of two modes on a line differ much from draw to draw: there are more."""
METHODS: dict[str, list[str]] = {
    "adjoint-matching": ["iterations=660"],
    "score-as-action": ["iterations=1000"],
    # no chain of theirs is to be sampled, but a velocity field
    "path-reweighted": ["sampling.solver=stochastic-heun", "method.num_inference_steps=15"],
    "tilt-matching": ["sampling.solver=stochastic-heun"],
    "exact": ["sampling.solver=stochastic-heun"],  # the field of the tilted law: what the sampler alone leaves
}
FIRST = {"name": "tilt-matching", "num_passes": 250, "regression_batch_size": 2048, "target_effective_sample_size": 0.4}
STRONG = [
    "method.first=" + json.dumps(FIRST | {"num_inference_steps": 15}),
    "method.first_steps=1250",
    "iterations=2150",
    "train_batch_size=16384",
    "method.num_passes=300",
    "method.regression_batch_size=2048",
    "method.paths=sampler",  # whose weights are the more even: with heun, 30 steps of as many evaluations are farther off
    "method.path_steps=60",
    "learning_rate=5e-3",
]
BOTH = {("ring, strong", "path-reweighted"): STRONG}
"""Overrides of a method on one problem: alone it stops there, for want of base samples that count, and says so. No gradient of
the reward enters."""
ANY_STEPS = ("tilt-matching", "path-reweighted", "exact")
"""Methods that learn from samples of an ODE, or from paths, whose steps are their own: one training serves every number of
steps."""
CHAINS = ("adjoint-matching", "score-as-action")
"""Methods whose trainings cost as much as the steps of their chain."""
SECONDS = {"adjoint-matching": 55.0, "score-as-action": 70.0, "path-reweighted": 45.0, "tilt-matching": 65.0, "both": 90.0}
SECONDS["exact"] = 5.0
"""About how long one training takes on one core at 15 steps."""
KEYS = ("distance", "distance_ode", "floor", "floor_std", "distance_span", "distance_ode_span", "floor_span", "span")
KEYS += ("reward", "reward_error", "reward_exact", "network_evaluations", "seconds", "achieved_tilt", "achieved_tilt_error")
KEYS += (
    "achieved_tilt_r2",
    "kl_to_target",
    "kl_to_target_error",
    "limits",
    "effective_sample_size",
    "path_kl",
    "path_kl_exact",
    "chain_optimum",
)


class Job(NamedTuple):
    """One training, and the numbers of steps that it is measured at."""

    case: str
    method: str
    steps: tuple[int, ...]
    seed: int
    extra: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """About how long it takes on one core."""
        both = (self.case, self.method) in BOTH
        return SECONDS["both" if both else self.method] * (self.steps[0] / 15 if self.method in CHAINS else 1)


def rows_by(job: Job) -> list[dict[str, Any]]:
    """A row for each number of steps: the run, and what it found, or the line with which it stopped."""
    torch.set_num_threads(1)
    fit = exact if job.method == "exact" else remembered()
    return [one(job, steps, fit) for steps in job.steps]


def remembered() -> Callable[[Verification, Watch], Fitted]:
    """A training that is not repeated, for settings that differ in how samples are drawn from what it made."""
    found: list[Fitted] = []

    def fit(settings: Verification, watch: Watch) -> Fitted:
        if not found:
            found.append(once(settings, watch))
        return found[0]

    return fit


def exact(settings: Verification, watch: Watch) -> Fitted:
    """The exact velocity of the tilted law, in the place of a training."""
    problem: Any = settings.problem
    law = problem.exact_law(settings.method, settings.iterations)
    return Fitted(problem.base_flow(), Flow(ExactVelocity(law)), Record(0, {"loss": 0.0}, 0.0, 0), 1)


def one(job: Job, steps: int, fit: Callable[[Verification, Watch], Fitted]) -> dict[str, Any]:
    """The row for one number of steps."""
    case, method, _, seed, extra = job
    row: dict[str, Any] = {"case": case, "method": method, "steps": steps, "seed": seed, "extra": list(extra)}
    sets = [
        *METHODS[method],
        *CASES[case],
        *BOTH.get((case, method), []),
        f"sampling.num_inference_steps={steps}",
        "num_samples_w2=100",  # a distance that no row has
        f"seed={seed}",
        *extra,
    ]
    if method not in ANY_STEPS:
        sets.append(f"method.num_inference_steps={steps}")
    try:
        found = verify(read_verification("mixture", "tilt-matching" if method == "exact" else method, sets), fit=fit).values
    except TiltflowError as error:
        return row | {"stopped": str(error)}
    return row | {key: found.get(key) for key in KEYS}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows so far."""
    path = folder / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def missing(options: argparse.Namespace) -> list[Job]:
    """The jobs that have no row yet, in the order in which they run."""
    known = {(row["case"], row["method"], row["steps"], row["seed"]) for row in rows_of(options.output)}
    jobs = []
    for case, method, seed in product(options.cases, options.methods, range(options.seeds)):
        steps = [k for k in options.steps if (case, method, k, seed) not in known]
        some = [tuple(steps)] if method in ANY_STEPS else [(k,) for k in steps]
        jobs += [Job(case, method, each, seed, tuple(options.set)) for each in some if each]
    return sorted(jobs, key=lambda job: (options.steps.index(job.steps[0]), -job.seconds))


def run(options: argparse.Namespace) -> None:
    """Run what is missing, until the time is over."""
    options.output.mkdir(parents=True, exist_ok=True)
    jobs, end = missing(options), time.monotonic() + options.time_limit
    with multiprocessing.Pool(options.processes) as pool, open(options.output / "rows.jsonl", "a") as file:
        results = pool.imap_unordered(rows_by, jobs)
        for number in range(len(jobs)):
            try:
                rows = results.next(None if math.isinf(end) else max(end - time.monotonic(), 0.01))
            except multiprocessing.TimeoutError:
                print(f"the time is over: {number} of {len(jobs)} jobs are done")
                return
            for row in rows:
                file.write(json.dumps(row) + "\n")
                print(line(row), flush=True)
                file.flush()


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    head = f"{row['case']:13} {row['method']:17} K={row['steps']:<3} seed {row['seed']}"
    if "stopped" in row:
        return f"{head}  stopped: {row['stopped']}"
    noisy, ode, floor = (row[key_of(row, kind)] for kind in ("distance", "distance_ode", "floor"))
    return (
        f"{head}  SDE {noisy / floor:5.2f}  ODE {ode / floor:5.2f} of the floor,"
        f" reward {row['reward']:.4f} (exact {row['reward_exact']:.4f}), {row['network_evaluations'] / 1e6:.1f}M evaluations,"
        f" {row['seconds']:.0f} s"
    )


def grouped(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[tuple[str, str, int], list[dict[str, Any]]]]:
    """Rows by case, method and steps, in order."""
    for case, method, steps in product(CASES, METHODS, sorted({row["steps"] for row in rows})):
        some = [row for row in rows if (row["case"], row["method"], row["steps"]) == (case, method, steps)]
        if some:
            yield (case, method, steps), some


def pm(values: Sequence[float | None], form: str = ".2f") -> str:
    """Mean ± standard deviation over seeds."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return ""
    return f"{statistics.mean(numbers):{form}}" + (f" ± {statistics.stdev(numbers):{form}}" if len(numbers) > 1 else "")


def key_of(row: dict[str, Any], kind: str) -> str:
    """The key of a distance, or of the floor: within the span of the tilt, where that has fewer dimensions than the space."""
    return kind + ("_span" if row["case"].endswith("-d") else "")


def table(options: argparse.Namespace) -> None:
    """Print the rows as a table of Markdown."""
    print("| problem | method | K | seeds | with noise | ODE | floor | reward − exact | achieved tilt | evaluations |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for (case, method, steps), rows in grouped(rows_of(options.output)):
        stopped, some = ([row for row in rows if ("stopped" in row) is has] for has in (True, False))
        if stopped:
            print(f"| {case} | {method} | {steps} | {len(stopped)} | {stopped[0]['stopped']} | | | | | |")
        if not some:
            continue
        kinds = ("distance", "distance_ode", "floor")
        cells = [
            case,
            method,
            str(steps),
            str(len(some)),
            *(pm([row[key_of(row, kind)] for row in some], ".3f") for kind in kinds),
        ]
        cells += [pm([row["reward"] - row["reward_exact"] for row in some], ".3f"), pm([row["achieved_tilt"] for row in some])]
        cells += [f"{statistics.mean(row['network_evaluations'] for row in some) / 1e6:.0f}M"]
        print(f"| {' | '.join(cells)} |")


def figures(options: argparse.Namespace) -> None:
    """Draw the two figures: distance against the number of steps, and against network evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows_of(options.output) if "stopped" not in row and row["case"] == "fixture"]
    colours = dict(zip(METHODS, ("tab:red", "tab:orange", "tab:blue", "tab:green", "tab:purple"), strict=True))
    for name, label in (
        ("steps", "steps K of the sampler, and of the chain that Adjoint Matching tunes"),
        ("network_evaluations", "network evaluations"),
    ):
        figure, axes = plt.subplots(figsize=(6.4, 4.2), constrained_layout=True)
        for method, colour in colours.items():
            some = [row for row in rows if row["method"] == method]
            if not some:
                continue
            for kind, style in (("", "o-"), ("_ode", "s--")):
                points = sorted({row[name] if name == "steps" else row["steps"] for row in some})
                chosen = [[row for row in some if row["steps"] == at] for at in points]
                x = [statistics.mean(row[name] for row in part) for part in chosen]
                y = [statistics.mean(row[f"distance{kind}"] for row in part) for part in chosen]
                axes.loglog(x, y, style, color=colour, label=f"{method}, {'ODE' if kind else 'with noise'}", markersize=5)
        if name == "steps":
            tuned = [row for row in rows if row["method"] in ("adjoint-matching", "score-as-action")]
            best = {row["steps"]: row["chain_optimum"]["distance"] for row in tuned}
            axes.loglog(sorted(best), [best[k] for k in sorted(best)], ":", color="black", label="exact optimum of the chain")
        if rows:
            axes.axhline(statistics.mean(row["floor"] for row in rows), color="grey", lw=1)
            floor = statistics.mean(row["floor"] for row in rows)
            axes.annotate(
                "floor: two exact samples", (axes.get_xlim()[1], floor), ha="right", va="top", color="grey", fontsize=8
            )
        axes.set(xlabel=label, ylabel="W2 to the tilted law")
        axes.set_ylim(bottom=0.01)
        if name == "steps":
            axes.set_xticks(sorted({row["steps"] for row in rows}), [str(k) for k in sorted({row["steps"] for row in rows})])
            axes.minorticks_off()
        axes.legend(fontsize=7, loc="center left" if name == "steps" else "lower left")
        figure.savefig(options.docs / f"exactness-{'steps' if name == 'steps' else 'cost'}.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table", "figures"))
    parser.add_argument("--output", type=Path, default=Path("runs/exactness"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the figures go")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", nargs="+", type=int, default=[15, 40])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `tiltflow verify`")
    parser.add_argument("--processes", type=int, default=2, help="one thread each")
    parser.add_argument(
        "--time-limit", type=float, default=math.inf, metavar="SECONDS", help="end by then; jobs that are not done are lost"
    )
    options = parser.parse_args()
    {"run": run, "table": table, "figures": figures}[options.verb](options)


if __name__ == "__main__":
    main()
