"""Mixed precision: networks evaluated in bfloat16 where that is faster, everything around them in the dtype of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

MixedPrecision = Literal["no", "bf16", "auto"]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]
"""dtype of the weights of a network."""


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is if that is more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_dtype(mixed_precision: MixedPrecision, device: torch.device | str) -> torch.dtype | None:
    """The autocast dtype for `mixed_precision` on `device`, None for no autocast: "auto" is bf16 where the hardware multiplies
    it, and "no" where it would be emulated."""
    if mixed_precision == "no" or (mixed_precision == "auto" and not _multiplies_bf16(torch.device(device))):
        return None
    return torch.bfloat16


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a network is evaluated. Weights stay in their own dtype, so no loss scale is needed."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@contextmanager
def tf32(allowed: bool | None, device: torch.device) -> Iterator[None]:
    """Float32 matrices and convolutions are computed in TF32 on CUDA in this context, or are not; afterwards as before. None
    leaves them as they are: by PyTorch's default convolutions are, and matrices are not."""
    if allowed is None or device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


@contextmanager
def without_cudnn_attention(device: torch.device) -> Iterator[None]:
    """PyTorch does not choose cuDNN for attention on CUDA in this context, unless it is asked for by its name.

    In 16 bits it is the first choice on a Hopper GPU, and its gradients are then wrong, and often not finite, where all that
    they are computed from is finite: of a FLUX transformer on an H100, with torch 2.11 and cuDNN 9.19. Others found the like:
    https://github.com/pytorch/pytorch/issues/196678, https://github.com/NVIDIA/cudnn-frontend/issues/160. So it is
    with every version: NVIDIA announces for cuDNN 9.26 that one cause is mended (cudnn-frontend/pull/628), with 9.26.0 others
    still have gradients of NaN (cudnn-frontend/issues/1072, open), and which of these a FLUX transformer met is not known.
    """
    cuda = torch.backends.cuda
    before = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(before and device.type != "cuda")
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(before)


GRADIENT_SCALE = 1024.0
"""Factor of the gradients inside a network in float16, whose smallest number is 6e-8; exact, as a power of two."""


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, scale: float) -> Tensor:
        context.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * context.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x, whose gradient is multiplied with `scale` on its way back."""
    scaled: Tensor = _ScaleGradient.apply(x, scale)  # type: ignore[no-untyped-call]
    return scaled


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cpu":
        # newer than the oldest torch that we support, which then computes in full precision
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
