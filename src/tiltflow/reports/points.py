"""Pictures of samples of one or two numbers: a histogram, or points, with lines of equal reward."""

# Mutation tests: none: pictures

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tiltflow.laws.law import Array
from tiltflow.reports.plots import COLOURS, figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Reward = Callable[[Tensor], Tensor]
Limits = Sequence[tuple[float, float]]
MOST, BINS, CELLS, LINES = 3000, 60, 80, 9
"""Points that are drawn, bars of a histogram, points of a line across the plane, and lines of equal reward."""
EDGE = 0.002
"""Share of the samples that may lie outside on either side."""


def are_points(x: Tensor) -> bool:
    """Whether samples x [n, *event] are one or two numbers each."""
    return x.ndim == 2 and x.shape[1] in (1, 2)


def frame(clouds: Sequence[Tensor]) -> list[tuple[float, float]]:
    """What is shown of each coordinate, the same for all of the clouds [n, 1 or 2], and as long in both."""
    edges = np.stack([np.quantile(each.double().numpy(), [EDGE, 1 - EDGE], axis=0) for each in clouds])
    low, high = edges[:, 0].min(0), edges[:, 1].max(0)
    middle, half = (low + high) / 2, 0.56 * max(float((high - low).max()), 1e-6)
    return [(float(m - half), float(m + half)) for m in middle]


def draw(x: Tensor, limits: Limits, colour: str, reward: Reward | None = None) -> Callable[[Path], object]:
    """What writes a PNG file of samples x [n, 1 or 2].

    Args:
        limits: of each coordinate; see `frame`.
        colour: name of `COLOURS`.
        reward: points [m, 1 or 2] -> [m], shown where it is finite.
    """

    def write(path: Path) -> None:
        with figure_of(4.4, 4.2 if len(limits) == 2 else 2.6, dpi=110, layout="constrained") as figure:
            axes, points = figure.subplots(), x.double().numpy()
            (_plane if len(limits) == 2 else _line)(axes, points, limits, COLOURS[colour], reward)
            axes.tick_params(length=0)
            figure.savefig(path, format="png", metadata={"Software": None})

    return write


def _plane(axes: Axes, points: Array, limits: Limits, colour: str, reward: Reward | None) -> None:
    if reward is not None:
        across, up = (torch.linspace(*each, CELLS) for each in limits)
        heights = reward(torch.cartesian_prod(across, up)).reshape(CELLS, CELLS).double().numpy()
        if np.isfinite(heights).all() and np.ptp(heights) > 0:
            lines = axes.contour(across, up, heights.T, LINES, colors=COLOURS["target"], linewidths=0.8, alpha=0.8)
            axes.clabel(lines, fontsize=7)
            axes.set_title("lines: the reward", fontsize=9, color=COLOURS["target"])
    axes.scatter(points[:MOST, 0], points[:MOST, 1], s=4, color=colour, alpha=0.35, linewidths=0)
    axes.set(xlim=limits[0], ylim=limits[1], aspect="equal")


def _line(axes: Axes, points: Array, limits: Limits, colour: str, reward: Reward | None) -> None:
    axes.hist(points[:, 0], BINS, range=limits[0], density=True, color=colour, alpha=0.6)
    axes.set(xlim=limits[0], ylabel="density")
    if reward is not None:
        across = torch.linspace(*limits[0], CELLS)
        other = axes.twinx()
        other.plot(across, reward(across[:, None]).double(), color=COLOURS["target"], linewidth=1.2)
        other.tick_params(length=0)
        other.set_title("line: the reward", fontsize=9, color=COLOURS["target"])
