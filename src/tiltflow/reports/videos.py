"""Videos for a reader: a row of frames, and an animated GIF."""

# Mutation tests: none: pictures

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from torch import Tensor

from tiltflow.reports.plots import grid_rows, image_grid

FRAMES = 8
"""Frames of a video in a row, evenly spaced."""
FRAMES_OF_REPORT, SIDE = 24, 192
"""Frames of a video in the GIF of a report, evenly spaced, and pixels of its longer side, at most: a report is one file."""
PER_SECOND = 16
"""Frames of a video in a second, as Wan 2.1 was trained on them."""


def spaced(videos: Tensor, most: int) -> Tensor:
    """Return up to `most` evenly spaced frames of videos [batch, frames, channels, height, width], the first and the last among
    them, shrunk to `SIDE`."""
    count, frames, _, height, width = videos.shape
    some = videos[:, torch.linspace(0, frames - 1, min(most, frames)).round().long()]
    shrink = SIDE / max(height, width)
    if shrink >= 1:
        return some
    small: Tensor = F.interpolate(
        some.flatten(0, 1).float(), size=[max(1, round(shrink * side)) for side in (height, width)], mode="area"
    )
    return small.reshape(count, -1, *small.shape[1:])


def frames_in_rows(videos: Tensor) -> Image.Image:
    """Arrange frames of videos [batch, frames, 1 or 3, height, width] in [-1, 1], a row for each video."""
    some = spaced(videos, FRAMES)
    return image_grid(some.flatten(0, 1), some.shape[1], scale=zoom(some))


def zoom(videos: Tensor) -> int:
    """Return by how much videos are enlarged: small ones to about `SIDE`."""
    return max(1, SIDE // max(videos.shape[-2:]))


def save_gif(videos: Tensor, columns: int, file: BinaryIO | Path, seconds: float | None = None) -> None:
    """Write videos [batch, frames, 1 or 3, height, width] in [-1, 1] as an animated GIF, in rows of `columns`.

    Args:
        seconds: of the animation; by default there are `PER_SECOND` frames in one.
    """
    frames = [image_grid(each, columns, scale=zoom(videos)) for each in videos.unbind(1)]
    save_frames(frames, file, round(1000 * (1 / PER_SECOND if seconds is None else seconds / len(frames))))


def save_frames(frames: Sequence[Image.Image], file: BinaryIO | Path, milliseconds: int) -> None:
    """Write frames, each of which is shown for so long, as an animated GIF that is repeated."""
    first, *others = map(dithered, frames)
    first.save(file, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0)


def dithered(frame: Image.Image) -> Image.Image:
    """Return a frame in its best 256 colours, dithered: without, smooth surfaces fall into patches."""
    few = frame.convert("RGB")
    return few.quantize(palette=few.quantize(256), dither=Image.Dither.FLOYDSTEINBERG)


def gif_rows(gif: bytes, count: int) -> list[bytes]:
    """Cut a GIF of `save_gif` with `count` rows into its rows."""
    with Image.open(io.BytesIO(gif)) as opened:
        milliseconds = opened.info.get("duration", 0)
        frames = [grid_rows(frame.convert("RGB"), count) for frame in ImageSequence.Iterator(opened)]
    rows = []
    for row in zip(*frames, strict=True):
        file = io.BytesIO()
        save_frames(row, file, milliseconds)
        rows.append(file.getvalue())
    return rows
