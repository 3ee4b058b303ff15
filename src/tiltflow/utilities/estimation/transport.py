r"""Optimal transport between samples: its cost, and a dual potential that any point has.

For the cost c(x, y) = |A (x - y)|^power the optimal plan between weighted points is a linear programme, solved exactly by POT,
in memory and time for up to a few thousand points. Its dual has a height v_j for each point y_j of the second law, and

    f(x) = min_j c(x, y_j) - v_j

is the potential of the first: at its own points the dual variable, and the largest function anywhere else that keeps to the
constraints f(x) + v_j <= c(x, y_j). It is the first variation of the cost in the first law, and its gradient that of the cost
of the way to the y_j where the minimum is.
"""

# Mutation tests: test_utility_transport.py

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.laws.law import Array

MOST_PAIRS = 30_000_000
"""Of points of both laws, whose costs are in memory at once."""
POINTS = 16
"""Of the second law, whose extreme heights are averaged."""
Metric = tuple[float, ...] | tuple[tuple[float, ...], ...]
"""A of the distance |A (x - y)| between flat samples: a factor for each coordinate, or the rows of a matrix; () is the
identity."""


def stretched(x: Tensor, metric: Metric, dtype: torch.dtype = torch.float64) -> Tensor:
    """A x for samples x [n, *event]: [n, d]. Raises InputError if A does not fit them or is singular."""
    flat = x.flatten(1).to(dtype)
    if not metric:
        return flat
    try:
        matrix = torch.tensor(metric, dtype=dtype, device=x.device)
    except ValueError:
        raise InputError("metric must be a factor for each coordinate, or the rows of a matrix, all of one length") from None
    d = flat.shape[1]
    if matrix.shape not in ((d,), (d, d)):
        raise InputError(f"metric must have {d} factors, or be a matrix [{d}, {d}], is {list(matrix.shape)}")
    matrix = torch.diag(matrix) if matrix.ndim == 1 else matrix
    if torch.linalg.matrix_rank(matrix) < d:
        raise InputError("metric must not be singular: moves along some direction would cost nothing")
    return flat @ matrix.T


@dataclass(frozen=True)
class Potential:
    """f(x) = min_j |A x - z_j|^power - v_j.

    Args:
        metric: A.
        points: z_j = A y_j, [m, d].
        heights: v_j, [m].
        power: 1 or 2.
    """

    metric: Metric
    points: Tensor
    heights: Tensor
    power: Literal[1, 2]

    def __call__(self, x: Tensor) -> Tensor:
        z = stretched(x, self.metric)
        with torch.no_grad():
            nearest = (_costs(z, self.points, self.power) - self.heights).argmin(1)
        # the cost to that point alone has the gradient of the minimum
        away: Tensor = torch.linalg.vector_norm(z - self.points[nearest], dim=1)
        return (away**self.power - self.heights[nearest]).to(x.dtype)


def solve(x: Tensor, p: Tensor, y: Tensor, metric: Metric, power: Literal[1, 2]) -> tuple[float, Potential]:
    """The cost of the best plan from x [n, *event] with probabilities p [n] to y [m, *event] with equal ones, and the potential
    of x. Raises InputError for more points than memory has room for."""
    import ot  # slow to import

    if len(x) * len(y) > MOST_PAIRS:
        raise InputError(f"exact transport between {len(x)} and {len(y)} samples takes too much memory: take fewer of them")
    some = p > 0
    points = stretched(y, metric)
    costs = _costs(stretched(x[some], metric), points, power).cpu().numpy()
    sources, sinks = p[some].cpu().numpy(), np.full(len(y), 1 / len(y))
    plan, log = ot.emd(sources / sources.sum(), sinks, costs, numItermax=10_000_000, log=True)
    # sums that differ in their last digit leave dust in the plan
    plan = np.where(plan > 1e-9 * np.minimum(sources[:, None], sinks), plan, 0)
    heights = _centred(log["v"], costs, plan)
    return float(log["cost"]), Potential(metric, points, torch.from_numpy(heights).to(points), power)


def _centred(heights: Array, costs: Array, plan: Array) -> Array:
    """Heights within the constraints that the plan leaves, not at their edge.

    The solver ends at a corner, where a sample is as near to the target of another as to its own, and the gradient there is
    that of either. If x_i goes to y_j, f(x_i) = c_ij - v_j is at most c_ik - v_k: v_k - v_j <= room_jk. The largest heights
    that keep to that are shortest ways from a point, the smallest ones minus those to a point; the mean of both over several
    points is at no edge.
    """
    room = np.full((len(heights), len(heights)), np.inf)
    for i, j in zip(*np.nonzero(plan), strict=True):
        room[j] = np.minimum(room[j], costs[i] - costs[i, j])
    room = np.maximum(room + heights[:, None] - heights, 0)
    return np.asarray(heights + (_shortest_ways(room) - _shortest_ways(room.T)).mean(0) / 2)


def _shortest_ways(lengths: Array) -> Array:
    """From some of the points to all, by Dijkstra's algorithm, for lengths [m, m] >= 0: [some, m]."""
    m = len(lengths)
    some = np.unique(np.linspace(0, m - 1, POINTS).astype(int))
    ways, ahead, rows = np.where(np.arange(m) == some[:, None], 0.0, np.inf), np.zeros((len(some), m)), np.arange(len(some))
    for _ in range(m):
        nearest = (ways + ahead).argmin(1)
        ahead[rows, nearest] = np.inf
        ways = np.minimum(ways, ways[rows, nearest][:, None] + lengths[nearest])
    return ways


def _costs(x: Tensor, y: Tensor, power: Literal[1, 2]) -> Tensor:
    distances: Tensor = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distances**power
