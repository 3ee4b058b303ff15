"""Plots: grids of images, and curves and histograms as SVG text. The same input gives the same bytes.

The colours of an SVG are CSS variables with a fallback, so that it follows the light or dark theme of the page around it and
is also complete as a file of its own.
"""

# Mutation tests: none: pictures

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tiltflow.data import to_pixels
from tiltflow.evaluation.metrics import Cost, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = {"ink": "#26303c", "soft": "#5f6a76", "line": "#dfe2e7", "base": "#7f8b98", "tuned": "#2f6fd0", "target": "#bd6a16"}
"""CSS variable of each colour, and its value if the page does not set it."""
SERIES = ("#2d6cce", "#c0433b", "#2c8955", "#b9661a", "#7a4cb0", "#12848a", "#ae407d", "#69737e")
"""Colours of several series, CSS variables --s0, --s1, .."""
LAYOUT: Literal["constrained"] | None = "constrained"
"""Matplotlib's engine that makes room for the labels of curves."""
PADDING = 2  # pixels around each image of a grid

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["line"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["soft"],
    "ytick.labelcolor": COLOURS["soft"],
    "axes.labelcolor": COLOURS["soft"],
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it takes the font of the page and can be searched
    "svg.hashsalt": "tiltflow",
}


@contextmanager
def figure_of(width: float, height: float, **options: Any) -> Iterator[Figure]:
    """A figure of this size, in inches, in the style of all plots while it is drawn. Matplotlib, which is slow to import, is
    imported only where something is drawn."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        yield Figure(figsize=(width, height), **options)


def ticks(axis: Axis, most: int, *, integer: bool = False) -> None:
    """At most so many steps between the ticks of an axis."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=integer))


def image_grid(images: Tensor, columns: int, *, scale: int = 2, padding: int = PADDING, background: int = 128) -> Image.Image:
    """Arrange images [count, 1 or 3, height, width] in [-1, 1] in rows of `columns`.

    Args:
        scale: width of an image's pixel in pixels of the picture.
        padding: pixels around each image.
        background: grey level of the padding and of empty cells.

    Raises ValueError for another shape, and for sizes that are not positive.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be [count, 1 or 3, height, width] with count > 0, got {list(images.shape)}")
    if columns < 1 or scale < 1 or padding < 0:
        raise ValueError(f"columns and scale must be positive, padding not negative, got {columns}, {scale}, {padding}")
    pixels = to_pixels(images).permute(0, 2, 3, 1).numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = pixels.shape
    rows, high, wide = math.ceil(count / columns), height + padding, width + padding
    canvas = np.full((rows * high + padding, columns * wide + padding, channels), background, np.uint8)
    for i, image in enumerate(pixels):
        top, left = padding + i // columns * high, padding + i % columns * wide
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas)


def grid_rows(picture: Image.Image, count: int) -> list[Image.Image]:
    """Cut a picture of `image_grid` with `count` rows into its rows, each with the padding around it."""
    high = (picture.height - PADDING) // count
    return [picture.crop((0, i * high, picture.width, (i + 1) * high + PADDING)) for i in range(count)]


def row_cells(row: Image.Image, count: int) -> list[Image.Image]:
    """Cut a row of `count` images of `image_grid` into these, each without padding; one is the row as it is."""
    wide = (row.width - PADDING) // count
    if count == 1:
        return [row]
    return [row.crop((PADDING + i * wide, PADDING, (i + 1) * wide, row.height - PADDING)) for i in range(count)]


def side_by_side(before: Image.Image, after: Image.Image, labels: tuple[str, str] = ("before", "after")) -> Image.Image:
    """Place two pictures of the same height side by side on white, each below its label. Raises ValueError for other
    heights."""
    import matplotlib

    if before.height != after.height:
        raise ValueError(f"the pictures must have the same height, got {before.height} and {after.height}")
    size = max(14, before.width // 18)
    gap, top = size, 2 * size
    canvas = Image.new("RGB", (before.width + gap + after.width, top + before.height), "white")
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    for picture, label, left in ((before, labels[0], 0), (after, labels[1], before.width + gap)):
        place = (left + picture.width / 2, top / 2)
        ImageDraw.Draw(canvas).text(place, label, fill=COLOURS["ink"], font=font, anchor="mm")
        canvas.paste(picture.convert("RGB"), (left, top))
    return canvas


def curves(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], *, references: Mapping[str, float] | None = None) -> str:
    """Plot keys of training records, one panel each: values, running mean and, if there is a `<key>_std`, a band of one
    standard deviation.

    Args:
        references: values that curves should reach, by key, as dashed lines.
    """
    with figure_of(4.4 * len(keys), 2.2, layout=LAYOUT) as figure:
        for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
            _curve(axes, rows, key, (references or {}).get(key))
        return as_svg(figure)


def _curve(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, reference: float | None) -> None:
    steps, values = _series(rows, key)
    smooth = _running_mean(values)
    spread_steps, spread = _series(rows, f"{key}_std")
    if len(values) and np.array_equal(steps, spread_steps):
        wide = _running_mean(spread)
        axes.fill_between(steps, smooth - wide, smooth + wide, color=COLOURS["tuned"], alpha=0.12, linewidth=0)
    axes.plot(steps, values, color=COLOURS["tuned"], alpha=0.4, linewidth=0.8)
    axes.plot(steps, smooth, color=COLOURS["tuned"], linewidth=2)
    if reference is not None:
        axes.axhline(reference, color=COLOURS["target"], linewidth=1.6, linestyle=(0, (4, 3)))
    if len(values) and values.min() > 0 and values.max() > 50 * values.min():
        axes.set_yscale("log")
    else:
        ticks(axes.yaxis, 5)
    ticks(axes.xaxis, 6, integer=True)
    axes.set_xlabel("iteration")
    axes.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
    axes.tick_params(length=0)
    axes.margins(x=0.01)


def looks(rows: Sequence[Mapping[str, Any]], name: str, axis: str = "iteration") -> str:
    """Plot a measure over the steps, which count what `axis` says, with error bars of one standard error, the value of the
    target law as a dashed line, and the first alarm as a vertical line.

    Args:
        rows: lines of monitor.jsonl; the first one is of the base.
    """
    steps = [row["step"] for row in rows]
    values, errors = (np.array([row["measures"][name][i] for row in rows], float) for i in (0, 1))
    target = (rows[0].get("target") or {}).get(name)
    alarm = next((row["step"] for row in rows if row["alarm"]), None)
    with figure_of(4.4, 2.2, layout=LAYOUT) as figure:
        axes = figure.subplots()
        axes.errorbar(steps, values, errors, color=COLOURS["tuned"], marker="o", markersize=4, linewidth=1.6, elinewidth=1)
        if target is not None:
            axes.axhline(target[0], color=COLOURS["target"], linewidth=1.6, linestyle=(0, (4, 3)))
        if alarm is not None:
            axes.axvline(alarm, color=COLOURS["ink"], linewidth=1.6)
        axes.set_xlabel(axis)
        ticks(axes.xaxis, 6, integer=True)
        ticks(axes.yaxis, 5)
        axes.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
        axes.tick_params(length=0)
        return as_svg(figure)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Any, Any]:
    """Return the steps and values of `key` in the records in which it is finite."""
    pairs = [(i + 1 if row.get("step") is None else row["step"], row.get(key)) for i, row in enumerate(rows)]
    kept = [(step, value) for step, value in pairs if isinstance(value, int | float) and math.isfinite(value)]
    return np.array([step for step, _ in kept], float), np.array([value for _, value in kept], float)


def _running_mean(values: Any) -> Any:
    """Average over a window of a twentieth of the curve, truncated at its ends."""
    window = np.ones(2 * (len(values) // 40) + 1)
    if not len(values):
        return values
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def class_histogram(
    base: Sequence[float],
    tuned: Sequence[float],
    target: Sequence[float],
    target_error: Sequence[float] | None,
    names: Sequence[str],
) -> str:
    """Plot the share of each class under the base, the tuned model and, with error bars, the target law, if it is known."""
    with figure_of(max(6.6, 0.66 * len(names)), 2.9, layout="constrained") as figure:
        axes, places = figure.subplots(), np.arange(len(names))
        for offset, label, heights in ((-0.27, "base", base), (0.0, "tuned", tuned), (0.27, "target", target)):
            if len(heights) == 0:  # the target law is not always known
                continue
            axes.bar(places + offset, 100 * np.asarray(heights, float), 0.25, color=COLOURS[label], label=label)
        if target_error is not None:
            bars = 100 * np.asarray(target_error, float)
            axes.errorbar(
                places + 0.27, 100 * np.asarray(target, float), bars, fmt="none", ecolor=COLOURS["ink"], elinewidth=1.4
            )
        crowded = sum(map(len, names)) > 8 * len(names)
        turn: dict[str, Any] = {"rotation": 35, "ha": "right"} if crowded else {}
        axes.set_xticks(places, names, parse_math=False, **turn)
        axes.tick_params(length=0)
        axes.tick_params(axis="x", labelcolor=COLOURS["ink"])
        ticks(axes.yaxis, 5)
        axes.yaxis.set_major_formatter("{x:g}%")
        axes.grid(axis="y", color=COLOURS["line"], linewidth=0.8)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside upper left", ncols=3, handlelength=1, handleheight=1)
        return as_svg(figure)


def pareto(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: Metric) -> str:
    """Plot the mean reward against a distance to the base: one dot per row, with standard deviations over seeds, and a line
    through the Pareto front.

    Args:
        rows: the points of sweep.json.
        keys: settings whose values label the dots.
        metric: a distance to the base, with a `cost`.
    """
    distance, cost = metric.swept, metric.cost or Cost()
    finished = sorted((row for row in rows if "error" not in row), key=lambda row: row[distance])
    with figure_of(6.6, 4.2, layout="constrained") as figure:
        axes = figure.subplots()
        front = [row for row in finished if row["on_front"]]
        axes.plot([row[distance] for row in front], [row["reward_tuned"] for row in front], color=COLOURS["tuned"], alpha=0.4)
        for row in finished:
            colour = COLOURS["tuned" if row["on_front"] else "base"]
            axes.errorbar(
                row[distance],
                row["reward_tuned"],
                row["reward_tuned_std"],
                row[f"{distance}_std"],
                fmt="o",
                color=colour,
                elinewidth=1,
                markersize=5,
            )
            text = ", ".join(f"{key} = {row[key]}" for key in keys)
            axes.annotate(text, (row[distance], row["reward_tuned"]), (6, -10), textcoords="offset points", fontsize=8)
        dashed: dict[str, Any] = {"color": COLOURS["base"], "linewidth": 1.2, "linestyle": (0, (4, 3))}
        if finished:
            axes.axhline(finished[0]["reward_base"], **dashed)
            if cost.at_base:
                axes.axvline(finished[0][cost.at_base], **dashed)
        axes.set_xlabel(f"{metric.axis} (dashed: {cost.meaning})" if cost.at_base else metric.axis)
        axes.set_ylabel("mean reward (dashed: base)")
        axes.grid(color=COLOURS["line"], linewidth=0.8)
        axes.tick_params(length=0)
        axes.margins(0.12)
        return as_svg(figure)


def as_svg(figure: Figure) -> str:
    """Return the figure as an <svg> element, without date, comments, or ids that could clash with another one on the page."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts draw the text
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<!--.*?-->\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;]*;", "font-family: system-ui, sans-serif;", text)
    for name, colour in (*COLOURS.items(), *((f"s{i}", colour) for i, colour in enumerate(SERIES))):
        text = text.replace(colour, f"var(--{name}, {colour})")
    return text
