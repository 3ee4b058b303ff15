"""`tiltflow verify` from several seeds: every number that it prints, as mean ± standard deviation over the seeds.

python benchmarks/verify_seeds.py mixture --iterations 660 --seeds 4
python benchmarks/verify_seeds.py mixture --method score-as-action --iterations 1000 --seeds 4
python benchmarks/verify_seeds.py two-modes --method orw-cfm-w2 --seeds 4      # a few minutes a seed, each of them
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from tiltflow.problems.verification.verify import read_verification
from tiltflow.runs.staged.verification import verify


def numbers(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a result, by dotted key."""
    for key, value in result.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem")
    parser.add_argument("--method", default="adjoint-matching")
    parser.add_argument("--iterations", type=int, help="default: the problem's")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in `tiltflow verify`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    overrides = options.set + ([] if options.iterations is None else [f"iterations={options.iterations}"])

    results = []
    for seed in range(options.seeds):
        settings = read_verification(options.problem, options.method, [*overrides, f"seed={seed}"])
        results.append(dict(numbers(verify(settings).values)))
        print(f"seed {seed}: distance {results[-1]['distance']:.4f}, floor {results[-1]['floor']:.4f}", flush=True)
    found = {}
    for key in results[0]:
        values = [result[key] for result in results if key in result]
        found[key] = {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}
        print(f"{key:32} {found[key]['mean']:10.4f} ± {found[key]['std']:.4f}")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
