"""The denoiser of a pipeline as a network of a flow: (x, time, condition) -> prediction, in the dtype of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.flows.flow import AnyFloats
from tiltflow.flows.precision import GRADIENT_SCALE, scale_gradient
from tiltflow.user_code import explained

Condition = Mapping[str, Any]
"""Keyword arguments of a denoiser: tensors [batch, ..], or mappings of tensors."""


class Denoiser(AnyFloats):
    """A pipeline's denoiser, called as (x [batch, *event], time [batch], condition) -> prediction [batch, *event], in the dtype
    of x.

    Inside a float16 network gradients are scaled up (`tiltflow.flows.precision`); outside, and in its adapter, they are not.

    Args:
        network: the U-Net or transformer of diffusers.
        predict: (network, x, time, condition) -> prediction, of the pipeline's family.
    """

    def __init__(self, network: nn.Module, predict: Callable[..., Tensor]):
        super().__init__()
        self.network, self.predict = network, predict

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        dtype = floating_dtype(self.network)
        with explained("the pipeline's denoiser"):
            if dtype != torch.float16:
                return self.predict(self.network, x.to(dtype), time.float(), in_dtype(condition, dtype)).to(x.dtype)
            inside = scale_gradient(x, 1 / GRADIENT_SCALE).to(dtype)
            predicted = self.predict(self.network, inside, time.float(), in_dtype(condition, dtype)).to(x.dtype)
            return scale_gradient(predicted, GRADIENT_SCALE)


def floating_dtype(network: nn.Module) -> torch.dtype:
    """Return the dtype in which a network computes: that of its first floating-point parameter of 16 bits or more, float32 if
    it has none. Parameters that bitsandbytes or others packed into 8 or 4 bits are skipped, and those of a LoRA, which is in
    float32 whatever the network is in."""
    for name, parameter in network.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1 and ".lora_" not in name:
            return parameter.dtype
    return torch.float32


def in_dtype(condition: Any, dtype: torch.dtype) -> Any:
    """Cast a condition to the dtype of the network that reads it, which may differ from that of the text encoders."""
    if isinstance(condition, Mapping):
        return {key: in_dtype(value, dtype) for key, value in condition.items()}
    return condition.to(dtype)
