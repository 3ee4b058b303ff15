"""Requests to the server: JSON with pictures as base64, their prompts and metadata. Any of them may be malicious."""

from __future__ import annotations

import base64
import binascii
import io
import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tiltflow.pictures import IMAGE, picture_of

MOST_PIXELS = 1 << 24  # of all images of a request together; their sources may be as many again
NPY = b"\x93NUMPY"  # first bytes of a .npy file


class BadRequestError(Exception):
    """The request is malformed."""


def read_request(body: bytes) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """Images [batch, channels, height, width] in [-1, 1], their prompts, which may be none, and the metadata of these, with the
    pictures that they are edits of, if there are any. Raises BadRequestError if they are anything else; nothing is unpacked
    before all pictures together are known to be small enough."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequestError("the request is not JSON") from None
    images, prompts = (tree.get("images"), tree.get("prompts", [])) if isinstance(tree, dict) else (None, None)
    if not isinstance(images, list) or not isinstance(prompts, list):
        raise BadRequestError('the request must be {"images": [..], "prompts": [..]}')
    if not images or len(prompts) not in (0, len(images)) or not all(isinstance(part, str) for part in (*images, *prompts)):
        raise BadRequestError("images and prompts must be texts, at least one image, and as many prompts or none")
    metadata = tree.get("metadata", [{} for _ in prompts])
    if not isinstance(metadata, list) or len(metadata) != len(prompts) or not all(isinstance(part, dict) for part in metadata):
        raise BadRequestError("metadata must be mappings, as many as prompts")
    sources = tree.get("sources", [])
    if (
        not isinstance(sources, list)
        or len(sources) not in (0, len(prompts))
        or not all(isinstance(part, str) for part in sources)
    ):
        raise BadRequestError("sources must be texts, as many as prompts or none")
    files = [read_base64(text, i) for i, text in enumerate([*images, *sources])]
    sizes = [size_of(file, i) for i, file in enumerate(files)]
    if len(set(sizes)) > 1:
        raise BadRequestError("the images of a request, and their sources, must be of one size")
    channels, height, width = sizes[0]
    if len(images) * height * width > MOST_PIXELS:
        raise BadRequestError(f"{len(images)} images of {height} x {width}: a request has {MOST_PIXELS} pixels at most")
    read = [read_image(file, channels, i) for i, file in enumerate(files)]
    if sources and channels != 3:
        raise BadRequestError("sources must be in colour")
    edited = [{IMAGE: picture_of(picture, "sources")} for picture in read[len(images) :]] or [{}] * len(metadata)
    told = [{**more, **picture} for more, picture in zip(metadata, edited, strict=True)]
    return torch.stack(read[: len(images)]), prompts, told


def read_base64(text: str, number: int) -> bytes:
    """The file of image `number` in a request."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequestError(f"image {number}: is not base64") from None


def size_of(file: bytes, number: int) -> tuple[int, int, int]:
    """(channels, height, width) of a .png or .npy file, by its header alone."""
    try:
        if not file.startswith(NPY):
            with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
                return (1 if image.mode == "L" else 3), image.height, image.width
        content = io.BytesIO(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[np.lib.format.read_magic(content)](content, max_header_size=1000)
    except Exception as error:  # Pillow and NumPy raise many kinds of exceptions for malicious files
        raise BadRequestError(f"image {number}: cannot be read ({error})") from None
    if dtype != np.float32 or len(shape) != 3 or shape[0] not in (1, 3) or min(shape) < 1:
        raise BadRequestError(f"image {number}: must be float32 [1 or 3, height, width], got {dtype} {shape}")
    return shape[0], shape[1], shape[2]


def read_image(file: bytes, channels: int, number: int) -> Tensor:
    """[channels, height, width] in [-1, 1], of a .png or .npy file."""
    try:
        if file.startswith(NPY):
            return torch.from_numpy(np.ascontiguousarray(np.load(io.BytesIO(file), allow_pickle=False)))
        with Image.open(io.BytesIO(file), formats=["PNG"]) as image:
            pixels = torch.from_numpy(np.array(image if channels == 1 else image.convert("RGB")))
            return pixels.reshape(*pixels.shape[:2], channels).permute(2, 0, 1).float() / 127.5 - 1
    except Exception as error:  # Pillow and NumPy raise many kinds of exceptions for malicious files
        raise BadRequestError(f"image {number}: cannot be read ({error})") from None
