"""Files of tensors: writing .safetensors with its sha256 computed on the way, and reading what others wrote.

The `save_file` of safetensors would do, but a checkpoint needs more: the digest without reading the file again, one tensor at a
time on the CPU instead of a copy of all, and no temporary file of another name when a process is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tiltflow.errors import InputError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
"""Names of the dtypes in the format."""
PART = 1 << 24  # bytes that are hashed and written at a time

Tree = dict[str, Any]
"""Nested mappings and lists of tensors, numbers, text and None."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write tensors of any device, layout and shape, and flush them onto the disk. Returns bytes and sha256 of the file.

    Raises TypeError for a dtype that the format lacks.
    """
    header, offset = {}, 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # as readers align them
    for name, tensor in ordered:
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: {tensor.dtype} cannot be saved")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, written = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:

        def write(content: memoryview) -> None:
            nonlocal written
            for at in range(0, len(content), PART):
                part = content[at : at + PART]
                digest.update(part)
                written += len(part)
                while part:
                    part = part[file.write(part) :]

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for _, tensor in ordered:
            array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            write(memoryview(array))
        os.fsync(file.fileno())
    return written, digest.hexdigest()


def read_tensors(path: Path, what: str) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of a file of torch.save with tensors only: no code of a pickle is run.

    Raises InputError, which calls the file `what`, if it cannot be read or has anything else in it.
    """
    try:
        safe = path.suffix == ".safetensors"
        weights: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, SafetensorError, EOFError) as error:
        raise InputError(f"{what} {path}: cannot be read ({str(error).strip().splitlines()[0]})") from None
    except Exception as error:  # the class that torch raises for a file with code is private
        raise InputError(f"{what} {path}: is refused ({str(error).strip().splitlines()[0]})") from None
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]  # the rest is how it was trained
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{what} {path}: must be a mapping of names to tensors")
    return weights
