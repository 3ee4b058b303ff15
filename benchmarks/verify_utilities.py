"""`tiltflow verify utility` for every utility, as the table of docs/utilities.md: means over the seeds.

python benchmarks/verify_utilities.py --seeds 3
python benchmarks/verify_utilities.py kl mmd --set dimension=2
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from tiltflow.problems.utility import SUITED
from tiltflow.problems.verification.verify import read_verification
from tiltflow.runs.staged.verification import verify

BEST = {
    "expected-reward": "N(1, 1)",
    "cvar": "tilt by −(t − x)₊/αs",
    "superquantile": "tilt by (x − t)₊/αs",
    "mean-variance": "N(1/2, 2/3)",
    "entropic-risk": "tilt by −exp(−x)/αZ",
    "log-barrier": "N(0.442, 1)",
    "augmented-lagrangian": "N(1/2, 1)",
    "entropy": "N(0, 3/2)",
    "kl": "x is added: N(1/2, 1)",
    "renyi": "x is added: a fixed point",
    "wasserstein-1": "2x is added: N(1, 1)",
    "wasserstein-2": "2x is added: N(1/2, 1)",
    "mmd": "x is added: a fixed point",
    "optimal-design": "N(0, 1.4997)",
    "spread-conditions": "each class tilted by log p_z/p",
    "sum": "E x + H/2: N(1, 3/2)",
    "function": "E x − Var x/2: N(1/2, 2/3)",
}
"""The best law with the settings of the problem."""


def row(name: str, found: list[dict[str, Any]]) -> str:
    """A row of the table."""

    def mean(key: str) -> float:
        return statistics.mean(each[key] for each in found)

    # each seed has the error of its own samples
    errors = {key: mean(f"{key}_error") / len(found) ** 0.5 for key in ("utility", "kl")}
    ratios = [each["ratio"] for each in found]
    spread = f" ± {statistics.stdev(ratios):.2f}" if len(ratios) > 1 else ""
    cells = [
        f"`{name}`",
        f"{found[0]['alpha']:g}",
        str(found[0]["stages"]),
        BEST[name],
        f"{statistics.mean(ratios):.2f}{spread}",
        f"{mean('utility_value'):.3f} ± {errors['utility']:.3f}",
        f"{mean('utility_exact'):.3f}",
        f"{mean('kl'):.3f} ± {errors['kl']:.3f}",
        f"{mean('kl_exact'):.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("utilities", nargs="*", help="default: all")
    parser.add_argument("--method", help="default: the problem's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `tiltflow verify`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    print("| utility | α | stages | best law | W2 / floor | utility | exact | KL | exact |")
    print("|---|---|---|---|---|---|---|---|---|")
    results = {}
    for name in options.utilities or SUITED:
        results[name] = [
            verify(read_verification("utility", options.method, [f"utility.name={name}", *options.set, f"seed={seed}"])).values
            for seed in range(options.seeds)
        ]
        print(row(name, results[name]), flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
