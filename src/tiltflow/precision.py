"""Mixed precision: networks evaluated in bfloat16 where that is faster, everything around them in the dtype of the samples."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

MixedPrecision = Literal["no", "bf16", "auto"]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]
"""Of the weights of a network."""


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is if that is more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_dtype(mixed_precision: MixedPrecision, device: torch.device | str) -> torch.dtype | None:
    """What `mixed_precision` means on `device`: "auto" is bf16 where the hardware multiplies it, and "no" where it would be
    emulated. None stands for no autocast."""
    if mixed_precision == "no" or (mixed_precision == "auto" and not _multiplies_bf16(torch.device(device))):
        return None
    return torch.bfloat16


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a network is evaluated. Weights stay in their own dtype, so no loss scale is needed."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        # newer than the oldest torch that we support, which then computes in full precision
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
