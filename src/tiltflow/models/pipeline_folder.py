"""Checks of the folder of a diffusers pipeline, before diffusers builds anything from it and after."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from tiltflow.errors import InputError
from tiltflow.shipped import INDEX

CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json")
MOST_BYTES = 1 << 20  # of a config
MOST: dict[str, float] = {
    r"layers|depth": 1000,
    r"num_train_timesteps": 100_000,
    r"model_max_length": 200_000,
    r"sample_size|pos_embed_max_size|image_size": 4096,
    r"theta|factor|epsilon|eps": 1e300,
    r"lambda_min_clipped": math.inf,  # minus infinity in every scheduler of DPM-Solver
}
"""Largest allowed numbers of a config, by regular expressions on their keys: about ten times those of the largest models. A
pipeline of 1e9 layers would be built for days before an error was found."""
MOST_OTHERWISE = 10**7
NO_LIMIT = int(1e30)  # model_max_length of a tokenizer without a limit, in transformers


def check_pipeline_folder(folder: Path) -> None:
    """Raise InputError if `folder` is not that of a pipeline, or has a config that is not JSON or has impossible numbers."""
    if not (folder / INDEX).exists():
        raise InputError(f"{folder}: has no {INDEX}; must be the folder of a diffusers pipeline")
    for weights in folder.glob("*/*.safetensors"):
        if not (weights.parent / CONFIGS[0]).exists():
            raise InputError(f"{weights.parent}: has weights, but no {CONFIGS[0]}")
    for path in (folder / INDEX, *sorted(path for name in CONFIGS for path in folder.glob(f"*/{name}"))):
        check_config(path)


def check_config(path: Path) -> None:
    """Raise InputError if a config is not JSON, or has impossible numbers."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: is larger than {MOST_BYTES} bytes")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path}: must be a mapping, got {type(tree).__name__}")
    check_numbers(tree, str(path))


def check_weights(folder: Path, components: Mapping[str, Any]) -> None:
    """Raise InputError if a network of a loaded pipeline has more numbers than its files: transformers initializes missing
    weights at random.

    Args:
        folder: the pipeline was loaded from it.
        components: of the pipeline, by name.
    """
    for name, part in components.items():
        files = sorted((folder / name).glob("*.safetensors"))
        if not isinstance(part, nn.Module) or not files:
            continue
        asked, found = sum(p.numel() for p in part.parameters()), 0
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                found += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        if found < asked:
            raise InputError(f"{folder / name}: its weights have {found} numbers, its {CONFIGS[0]} needs {asked}")


def check_numbers(value: Any, where: str, key: str = "") -> None:
    """Raise InputError for a number larger than that of any model; see `MOST`."""
    if isinstance(value, dict):
        for name, part in value.items():
            check_numbers(part, where, str(name))
    elif isinstance(value, list):
        for part in value:
            check_numbers(part, where, key)
    elif isinstance(value, (int, float)) and value != NO_LIMIT:
        most = next((limit for pattern, limit in MOST.items() if re.search(pattern, key)), MOST_OTHERWISE)
        if not abs(value) <= most:
            raise InputError(f"{where}: {key} is {str(value)[:20]}, and no model has more than {most:g}")
