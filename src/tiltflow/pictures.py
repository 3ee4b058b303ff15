"""Pictures that are given, those that edits start from: files, images of PIL, tensors."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.user_code import refused

IMAGE = "image"
"""Key, in the metadata of an item, of the picture that it is an edit of."""


@dataclass(frozen=True)
class Picture:
    """A picture that is given; two of one name are the same.

    Args:
        name: the absolute path of its file, or what else it is known by.
        open: opens it.
    """

    name: str
    open: Callable[[], Image.Image] = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.name

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width, of which the head of a file is enough."""
        with self.open() as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return (image.width, image.height) if turned else (image.height, image.width)

    def pixels(self, height: int, width: int) -> Tensor:
        """Return [3, height, width] in [-1, 1], resized as diffusers does it. Raises InputError if it cannot be read."""
        with refused(f"picture {self}: cannot be read"), self.open() as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            numbers = np.array(upright.resize((width, height), Image.Resampling.LANCZOS))
        return 2 * torch.from_numpy(numbers).permute(2, 0, 1).float() / 255 - 1


def picture_of(value: Any, where: str, folder: str | Path = "") -> Picture:
    """Return the picture that a path, an image of PIL or a tensor [3, height, width] in [-1, 1] stands for.

    Args:
        folder: in which paths begin.

    Raises InputError, which begins with `where`, for anything else, and for what cannot be read.
    """
    if isinstance(value, Picture):
        picture = value
    elif isinstance(value, (str, Path)):
        there = os.path.abspath(os.path.join(folder, value))
        picture = Picture(there, partial(Image.open, there))
    elif isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3 and len(value) == 3:
        numbers = ((value.detach().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        picture = _in_memory(Image.fromarray(numbers))
    elif isinstance(value, Image.Image):
        picture = _in_memory(value)
    elif isinstance(value, bytes) or (isinstance(value, Mapping) and {"bytes", "path"} <= value.keys()):
        content, path = _content(value)
        name = str(path) if content is None else f"sha256:{hashlib.sha256(content).hexdigest()}"
        picture = Picture(name, partial(stored, value))
    else:
        got = f"a tensor {list(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(
            f"{where}: a picture is a path, an image of PIL or a tensor [3, height, width] of floats in [-1, 1], got {got}"
        )
    if isinstance(value, (str, Path)) and not os.path.exists(picture.name):
        raise InputError(f"{where}: there is no picture {picture}")
    with refused(f"{where}: {picture} is not a picture"):
        _ = picture.size
    return picture


def _in_memory(image: Image.Image) -> Picture:
    """A picture in memory, named by a hash of its pixels; a copy, which its owner cannot change."""
    copied = ImageOps.exif_transpose(image).convert("RGB")
    name = hashlib.sha256(f"{copied.size}".encode() + copied.tobytes()).hexdigest()
    return Picture(f"sha256:{name}", copied.copy)


def stored(value: bytes | Mapping[str, Any]) -> Image.Image:
    """Open a picture as tables store it: its bytes, or a mapping with its bytes, or with its path instead."""
    content, path = _content(value)
    return Image.open(str(path) if content is None else io.BytesIO(content))


def _content(value: bytes | Mapping[str, Any]) -> tuple[bytes | None, str | None]:
    return (value, None) if isinstance(value, bytes) else (value["bytes"], value["path"])


def edited(metadata: Mapping[str, Any]) -> Picture | None:
    """Return the picture that an item with this metadata is an edit of, if it is one."""
    found = metadata.get(IMAGE)
    return found if isinstance(found, Picture) else None


def batch_of(pictures: Sequence[Picture], height: int, width: int) -> Tensor:
    """Return pictures [batch, 3, height, width] in [-1, 1]; each is read once."""
    known = {picture: picture.pixels(height, width) for picture in dict.fromkeys(pictures)}
    return torch.stack([known[picture] for picture in pictures])
