"""Size of an image as a JPEG file: how well it compresses with loss."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.rewards import Reward
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.rewards.png_size import file_sizes
from tiltflow.settings import Settings


class JpegSize(Settings):
    """Bytes of the JPEG file that Pillow writes at a quality, header included (Black et al., arXiv 2305.13301)."""

    differentiable: ClassVar[bool] = False
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "bytes"

    name: Literal["jpeg-size"] = "jpeg-size"
    quality: Annotated[int, Field(ge=1, le=100)] = 75
    """JPEG quality, 1 (coarse) to 100 (fine)."""
    sign: Literal["smaller", "larger"] = "smaller"
    """Whether `smaller` files are better (smooth images), or `larger` ones (detailed images)."""

    @property
    def description(self) -> str:
        sign, side = ("", "above") if self.sign == "larger" else ("minus the ", "below")
        return f"{sign}size of the image as a JPEG file of quality {self.quality}, {side} 0"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        direction = 1 if self.sign == "larger" else -1

        def jpeg_size(x: Tensor) -> Tensor:
            return direction * file_sizes(x, lambda image, file: image.save(file, "JPEG", quality=self.quality))

        return of_frames(jpeg_size)
