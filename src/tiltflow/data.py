"""Image data sets from an .npz file or a folder of images."""

from __future__ import annotations

import hashlib
import re
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiltflow.errors import InputError

UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, MemoryError, OverflowError, SyntaxError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
)
"""Exceptions that NumPy and Pillow raise for a damaged or malicious file."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


@dataclass(frozen=True)
class ImageData:
    """Images [count, channels, height, width] in [-1, 1], labels [count] (or None) and the names of the classes."""

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: str) -> ImageData:
        """Copy images and labels to a device."""
        return replace(self, images=self.images.to(device), labels=None if self.labels is None else self.labels.to(device))


def load_images(path: str | Path, split: Literal["train", "test"] = "train") -> ImageData:
    """Read one split of a data set.

    An .npz file holds x_train, y_train, x_test, y_test: uint8 images [count, height, width] or [.., channels] and
    integer labels. A folder holds images of one size, or train/ and test/ with such images; subfolders are classes.
    Raises InputError if there is nothing readable.
    """
    path = Path(path)
    if path.is_dir():
        folder = path / split if (path / split).is_dir() else path
        return _from_folder(folder)
    if not path.exists():
        raise InputError(f"{path}: no such data set; give an .npz file or a folder of images with --data")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:  # NumPy leaves a damaged file open
            if f"x_{split}" not in archive:
                raise InputError(f"{path}: holds {', '.join(archive.files)}, but no x_{split}")
            images = archive[f"x_{split}"]
            labels = archive.get(f"y_{split}")
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable .npz file ({error})") from None
    count = int(labels.max()) + 1 if labels is not None else 0
    return ImageData(
        _to_tensor(images, path),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        tuple(str(i) for i in range(count)),
    )


def _from_folder(folder: Path) -> ImageData:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise InputError(f"{folder}: holds no images ({', '.join(sorted(SUFFIXES))})")
    classes = sorted({f.parent.name for f in files}) if all(f.parent != folder for f in files) else []
    arrays = []
    for file in files:
        try:
            with Image.open(file) as image:
                arrays.append(np.asarray(image if image.mode == "L" else image.convert("RGB")))
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            raise InputError(f"{file}: not a readable image ({error})") from None
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise InputError(f"{folder}: images of different sizes or modes: {', '.join(map(str, sorted(shapes, key=str)[:3]))}")
    labels = torch.tensor([classes.index(f.parent.name) for f in files]) if classes else None
    return ImageData(_to_tensor(np.stack(arrays), folder), labels, tuple(classes))


def _to_tensor(images: np.ndarray[Any, Any], where: Path) -> Tensor:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise InputError(
            f"{where}: images must be uint8 [count, height, width] or [.., channels], got {images.dtype} {images.shape}"
        )
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    tensor = tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2)
    return tensor.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Convert floats in [-1, 1] to uint8; values outside are clipped."""
    return ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def fingerprint(path: Path) -> str:
    """First 8 hex digits of the sha256 of a file, or of the names and sizes of the files in a folder: identifies the data of a
    model."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            digest.update(f"{file.relative_to(path)} {file.stat().st_size}\n".encode())
    else:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


@dataclass(frozen=True)
class CaptionedImages:
    """RGBA images [count, 4, height, width] in [-1, 1], and a caption for each."""

    images: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: str) -> CaptionedImages:
        """Copy the images to a device."""
        return replace(self, images=self.images.to(device))


def load_captioned(path: str | Path, *, include: tuple[str, ...] = (), least_opaque: float = 0.0) -> CaptionedImages:
    """Read an .npz file of `images`, uint8 [count, height, width, 3 or 4], and their `names`: `mon/undead/bone_dragon2` shows
    an undead bone dragon.

    Args:
        include: beginnings of the names of the images that are read; empty for all.
        least_opaque: share of the pixels of an image that must not be transparent; others are left out.

    Raises InputError if there is nothing readable.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such data set; give an .npz file of images and names with --data")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:  # NumPy leaves a damaged file open
            if missing := {"images", "names"} - set(archive.files):
                raise InputError(f"{path}: holds {', '.join(archive.files)}, but no {sorted(missing)[0]}")
            images, names = archive["images"], [str(name) for name in archive["names"]]
    except UNREADABLE as error:
        raise InputError(f"{path}: not a readable .npz file ({error})") from None
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or len(images) != len(names):
        raise InputError(
            f"{path}: needs images [count, height, width, 3 or 4] and as many names, got {images.shape}, {len(names)}"
        )
    if images.shape[-1] == 3:
        images = np.concatenate([images, np.full_like(images[..., :1], 255)], -1)
    opaque = (images[..., 3] > 0).mean((1, 2))
    chosen = [i for i, name in enumerate(names) if name.startswith(include or "") and opaque[i] >= least_opaque]
    if not chosen:
        raise InputError(
            f"{path}: no name begins with {', '.join(include)}; there are {', '.join(sorted({n.split('/')[0] for n in names}))}"
        )
    return CaptionedImages(_to_tensor(images[chosen], path), [words_of(names[i]) for i in chosen])


@dataclass(frozen=True)
class Pairs:
    """Preferred samples and the others [count, *event] each, and the prompts that both are of, where they are known."""

    winners: Tensor
    losers: Tensor
    prompts: list[str] | None = None

    def __len__(self) -> int:
        return len(self.winners)

    def to(self, device: str | torch.device) -> Pairs:
        """Copy the samples to a device."""
        return replace(self, winners=self.winners.to(device), losers=self.losers.to(device))

    def of_prompt(self, prompt: str) -> list[int]:
        """The numbers of the pairs of a prompt."""
        return [i for i, text in enumerate(self.prompts or ()) if text == prompt]


def load_pairs(path: str | Path) -> Pairs:
    """Read pairs of samples of which one is preferred.

    An .npz file holds `winners` and `losers`: uint8 images as in `load_images`, or floats [count, *event] as a model samples
    them; and `prompts`, if they have some. A folder holds images of one size in two folders of these names, those of a pair by
    one name, and a file prompts.txt with a line for each, in the order of the names. Raises InputError if nothing is readable.
    """
    path = Path(path)
    prompts: list[str] | None = None
    if path.is_dir():
        several = [path / side for side in ("winners", "losers")]
        named = [sorted(f.name for f in side.rglob("*") if f.suffix.lower() in SUFFIXES) for side in several]
        if named[0] != named[1]:
            odd = sorted(set(named[0]) ^ set(named[1]))
            raise InputError(f"{path}: {odd[0]} is in one of the folders winners and losers alone")
        sides = [_from_folder(side).images for side in several]
        if (path / "prompts.txt").exists():
            prompts = (path / "prompts.txt").read_text(encoding="utf-8").splitlines()
    else:
        if not path.is_file():
            raise InputError(f"{path}: no such pairs; give an .npz file, or a folder with the folders winners and losers")
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                if missing := {"winners", "losers"} - set(archive.files):
                    raise InputError(f"{path}: holds {', '.join(archive.files)}, but no {sorted(missing)[-1]}")
                arrays = [archive["winners"], archive["losers"]]
                prompts = [str(prompt) for prompt in archive["prompts"]] if "prompts" in archive else None
        except UNREADABLE as error:
            raise InputError(f"{path}: not a readable .npz file ({error})") from None
        sides = [_floats(array) if array.dtype.kind == "f" else _to_tensor(array, path) for array in arrays]
    shapes = [list(side.shape) for side in sides]
    if shapes[0] != shapes[1] or not len(sides[0]):
        raise InputError(f"{path}: needs as many winners as losers of one shape, got {shapes[0]} and {shapes[1]}")
    if prompts is not None and len(prompts) != len(sides[0]):
        raise InputError(f"{path}: has {len(prompts)} prompts for {len(sides[0])} pairs")
    return Pairs(sides[0], sides[1], prompts)


def _floats(array: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.astype(np.float32)))


def words_of(name: str) -> str:
    """The words of a name, without its first folder and without numbers.

    >>> words_of("mon/undead/zombies/zombie_crab_2")
    'undead zombie crab'
    """
    parts = [re.sub(r"[\d_]+", " ", part).split() for part in name.split("/")[1:]]
    words = [word for part in parts for word in part]
    # zombies/zombie_crab: the kind is not said twice
    return " ".join(
        word for i, word in enumerate(words) if not any(other.startswith(word.rstrip("s")) for other in words[i + 1 :])
    )
