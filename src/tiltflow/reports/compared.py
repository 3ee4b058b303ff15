"""Plots of a comparison of methods: a curve or a point for each, in the same colour and with the same mark everywhere."""

# Mutation tests: none: pictures

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tiltflow.reports.plots import COLOURS, SERIES, as_svg, figure_of, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKS = "osDv^PX*"
AROUND = 1.0
"""How far from base and target law values are shown, in units of the distance between these."""
Number = Mapping[str, Any]
"""`mean` and `error` over seeds."""


def style_of(place: int) -> dict[str, Any]:
    """Colour and mark of the method at this place."""
    return {"color": SERIES[place % len(SERIES)], "marker": MARKS[(place + place // len(SERIES)) % len(MARKS)]}


def window(levels: Mapping[str, float | None]) -> tuple[float, float] | None:
    """What is shown of values, if base and target law have these: a training that runs away would hide all others.

    >>> window({"base": 2.0, "target": 4.0}), window({"base": 1.0, "target": None})
    ((0.0, 6.0), None)
    """
    known = [level for level in levels.values() if level is not None]
    if len(known) < 2:
        return None
    low, high = min(known), max(known)
    room = AROUND * max(high - low, 0.1 * abs(high))
    return low - room, high + room


def outside(values: Mapping[str, float | None], shown: tuple[float, float] | None) -> list[str]:
    """The names of the values that are not shown."""
    if shown is None:
        return []
    return [name for name, value in values.items() if value is not None and not shown[0] <= value <= shown[1]]


def curves(
    series: Mapping[str, Sequence[tuple[float, Number]]],
    across: str,
    up: str,
    levels: Mapping[str, float | None],
    *,
    log: bool = False,
) -> str:
    """A curve for each method, with standard errors over seeds.

    Args:
        series: (cost, value) of each method.
        across, up: titles of the axes.
        levels: dashed lines, by name.
        log: whether the axis of the values is logarithmic.
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
        if log:
            axes.set_yscale("log")
        else:
            _show(axes, "y", window(levels))
        axes.set_xlim(left=0)
        ticks(axes.xaxis, 5)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        return _ended(figure, axes)


def front(
    points: Sequence[Mapping[str, Any]],
    cost: str,
    across: str,
    levels: Mapping[str, float | None],
    shown: tuple[float, float] | None,
    *,
    log: bool = False,
) -> str:
    """The reward against `cost`: a point for each method, with standard errors over seeds, and a line through the front.

    Args:
        points: methods of comparison.json.
        levels: dashed lines across, by name.
        shown: of the cost; None for all.
        log: whether the axis of the cost is logarithmic.
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
        _show(axes, "y", window(levels))
        if log:
            axes.set_xscale("log")
        _show(axes, "x", shown)
        return _ended(figure, axes)


def _show(axes: Axes, which: Literal["x", "y"], shown: tuple[float, float] | None) -> None:
    """Leave out what lies outside, where something does."""
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    if shown is not None and (low < shown[0] or high > shown[1]):
        axes.set(**{f"{which}lim": (max(low, shown[0]), min(high, shown[1]))})


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
