"""Plots of a comparison of methods: a curve or a point for each, in the same colour and with the same mark everywhere."""

# Mutation tests: none: pictures

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tiltflow.reports.plots import COLOURS, SERIES, as_svg, figure_of, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = "osDv^PX*"
Number = Mapping[str, Any]
"""`mean` and `error` over seeds."""


def style_of(place: int) -> dict[str, Any]:
    """Colour and mark of the method at this place."""
    return {"color": SERIES[place % len(SERIES)], "marker": MARKS[(place + place // len(SERIES)) % len(MARKS)]}


def curves(
    series: Mapping[str, Sequence[tuple[float, Number]]], across: str, up: str, levels: Mapping[str, float | None]
) -> str:
    """A curve for each method, with standard errors over seeds.

    Args:
        series: (cost, value) of each method.
        across, up: titles of the axes.
        levels: dashed lines, by name.
    """
    from matplotlib.ticker import EngFormatter

    with figure_of(5.6, 3.9, layout="constrained") as figure:
        axes = figure.subplots()
        for place, (name, points) in enumerate(series.items()):
            known = [(x, each["mean"], each["error"] or 0.0) for x, each in points if each["mean"] is not None]
            if known:
                x, y, error = zip(*known, strict=True)
                axes.errorbar(x, y, error, label=name, elinewidth=1, markersize=5, linewidth=1.5, **style_of(place))
        _levels(axes, levels)
        axes.set(xlabel=across, ylabel=up)
        axes.set_xlim(left=0)
        ticks(axes.xaxis, 5)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        return _ended(figure, axes)


def front(points: Sequence[Mapping[str, Any]], cost: str, across: str, levels: Mapping[str, float | None]) -> str:
    """The reward against `cost`: a point for each method, with standard errors over seeds, and a line through the front.

    Args:
        points: methods of comparison.json.
        levels: dashed lines across, by name.
    """
    with figure_of(5.6, 3.9, layout="constrained") as figure:
        axes = figure.subplots()
        known = [
            (place, m) for place, m in enumerate(points) if m["reward"]["mean"] is not None and m[cost]["mean"] is not None
        ]
        best = sorted(((m[cost]["mean"], m["reward"]["mean"]) for _, m in known if m[f"on_front_of_{cost}"]))
        axes.plot(*zip(*best, strict=True) if best else ([], []), color=COLOURS["base"], linewidth=1, zorder=0)
        for place, m in known:
            errors = m["reward"]["error"] or 0.0, m[cost]["error"] or 0.0
            where = m[cost]["mean"], m["reward"]["mean"]
            axes.errorbar(*where, *errors, label=m["method"], elinewidth=1, markersize=6, linestyle="none", **style_of(place))
        _levels(axes, levels)
        axes.set(xlabel=across, ylabel="mean reward")
        axes.margins(0.12)
        return _ended(figure, axes)


def _levels(axes: Axes, levels: Mapping[str, float | None]) -> None:
    """Dashed lines, each with its name at its right end."""
    for name, level in levels.items():
        if level is not None:
            axes.axhline(level, color=COLOURS["base"], linewidth=1, linestyle=(0, (4, 3)), zorder=0)
            place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom", "fontsize": 8}
            axes.text(1.0, level, name, color=COLOURS["soft"], **place)


def _ended(figure: Any, axes: Axes) -> str:
    """The figure with its legend below, as SVG."""
    axes.grid(color=COLOURS["line"], linewidth=0.8)
    axes.tick_params(length=0)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return as_svg(figure)
