"""Size of an image as a PNG file: how well it compresses without loss."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from PIL import Image
from torch import Tensor

from tiltflow.data import to_pixels
from tiltflow.errors import InputError
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.settings import Settings


class PngSize(Settings):
    """Bytes of the PNG file that Pillow writes by default, header included. It varies a little with Pillow's compressor."""

    differentiable: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "bytes"

    name: Literal["png-size"] = "png-size"
    sign: Literal["smaller", "larger"] = "smaller"
    """Whether `smaller` files are better (plain images), or `larger` ones (busy images)."""

    @property
    def description(self) -> str:
        sign, side = ("", "above") if self.sign == "larger" else ("minus the ", "below")
        return f"{sign}size of the image as a PNG file, {side} 0"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        direction = 1 if self.sign == "larger" else -1

        def png_size(x: Tensor) -> Tensor:
            return direction * file_sizes(x, lambda image, file: image.save(file, "PNG"))

        return of_frames(png_size)


def file_sizes(x: Tensor, write: Callable[[Image.Image, io.BytesIO], None]) -> Tensor:
    """Bytes [batch], float32, that `write` makes of each of the images [batch, 1 or 3, height, width], clipped to [-1, 1].

    No gradient. An image with NaN or infinity has no file and gets NaN. Raises InputError for another number of channels.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InputError(f"the size of a file needs images [batch, 1 or 3, height, width], got {list(x.shape)}")
    arrays = to_pixels(x).permute(0, 2, 3, 1).numpy()
    sizes = []
    for array in arrays:
        file = io.BytesIO()
        write(Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array), file)
        sizes.append(file.tell())
    finite = x.detach().isfinite().flatten(1).all(1)
    return torch.tensor(sizes, dtype=torch.float32, device=x.device).where(finite, torch.nan)
