"""Compare: three methods on one problem at one budget, against the law that is known exactly; one page at the end.

python examples/compare.py [network evaluations of each training] [seeds]
"""

import sys

import tiltflow

BUDGET = float(sys.argv[1]) if len(sys.argv) > 1 else 1e6
SEEDS = int(sys.argv[2]) if len(sys.argv) > 2 else 2

found = tiltflow.compare(
    ["adjoint-matching", "endpoint-adjoint-matching", "draft"],
    ["gaussian"],
    seeds=SEEDS,
    network_evaluations=BUDGET,
    tune="none",  # by default each learning rate is tuned first
    output="runs/compare",  # the same call again goes on where it stopped
    watch=lambda title, what, part: print(f"{title}: {what}"),
)
for method in found["results"][0]["methods"]:
    reward, distance, floor = (method[key] for key in ("reward", "distance", "floor"))
    print(f"{method['method']}: reward {reward['mean']:.2f}, distance {distance['mean']:.3f}, at best {floor['mean']:.3f}")
print("runs/compare/report.html")
