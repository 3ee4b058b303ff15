"""Quantized weights of a pipeline's frozen networks: nf4 by bitsandbytes, int8 and float8 by torchao, as diffusers loads them.

Weights alone are quantized, and multiply activations in the dtype of the rest of the network: the adapter and all mathematics
are in float32, and gradients with respect to the states pass through the weights as they are after quantization.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tiltflow.errors import InputError, did_you_mean, not_installed

Quantization = Literal["nf4", "int8", "float8"]
PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "float8": "torchao"}
"""The package that quantizes, which is also the name of the extra that installs it."""
CONFIGS = {"nf4": "BitsAndBytesConfig", "int8": "TorchAoConfig", "float8": "TorchAoConfig"}
"""Its configuration in diffusers and transformers, which have one each."""
OF_TORCHAO = {"int8": "Int8WeightOnlyConfig", "float8": "Float8WeightOnlyConfig"}
"""torchao's own, inside that: a scale for each row of a matrix."""
TEXT_ENCODER = "text_encoder"
"""Beginning of the names of the networks of transformers; the denoisers are of diffusers."""


def check_kinds(kinds: Mapping[str, str], networks: list[str], pipeline: str) -> None:
    """Raise InputError for a component that is none of `networks`, and for a kind that is not known."""
    for name, kind in kinds.items():
        where = f"model.quantization.{name} {kind}"
        if name not in networks:
            raise InputError(f"{where}: {pipeline} has no such network to quantize{did_you_mean(name, networks)}")
        if kind not in PACKAGES:
            raise InputError(f"{where}: must be {', '.join(get_args(Quantization))}{did_you_mean(kind, PACKAGES)}")


def check_quantization(kinds: Mapping[str, str], networks: list[str], pipeline: str) -> None:
    """As `check_kinds`, and raise InputError for a kind whose package or device is not here."""
    check_kinds(kinds, networks, pipeline)
    for name, kind in kinds.items():
        where = f"model.quantization.{name} {kind}"
        if find_spec(PACKAGES[kind]) is None:
            raise not_installed(f"{where}: {PACKAGES[kind]}", PACKAGES[kind])
        if kind == "nf4" and not name.startswith(TEXT_ENCODER) and not torch.accelerator.is_available():
            raise InputError(f"{where}: diffusers packs it on a GPU alone, and there is none; int8 and float8 need none")


def config_of(name: str, kind: str, dtype: torch.dtype) -> Any:
    """Return the configuration with which a component is loaded, by its name.

    Args:
        dtype: in which the network computes.
    """
    library = importlib.import_module("transformers" if name.startswith(TEXT_ENCODER) else "diffusers")
    config: Any = getattr(library, CONFIGS[kind])
    if kind == "nf4":
        return config(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return config(getattr(importlib.import_module("torchao.quantization"), OF_TORCHAO[kind])())


def is_quantized(network: nn.Module) -> bool:
    """Whether a network has weights that are packed into bytes, which cannot be trained themselves."""
    return any(p.element_size() == 1 or type(p) is not nn.Parameter for p in network.parameters())


def stored(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor is stored in: itself, or for a quantized one numbers and scales."""
    packed: Any = tensor
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in packed.__tensor_flatten__()[0] for part in stored(getattr(packed, name))]
