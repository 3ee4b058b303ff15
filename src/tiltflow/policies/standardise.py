"""Observations in standard deviations from a mean, as networks see them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Standardise(nn.Module):
    """(observations - mean) / std, of buffers that are 0 and 1 until `fit` sets them."""

    mean: Tensor
    std: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))

    def fit(self, observations: Tensor) -> None:
        """See observations in the mean and standard deviation of these [n, observation]; what never changes as it is."""
        self.mean.copy_(observations.mean(0))
        std = observations.std(0, correction=0)
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def forward(self, observations: Tensor) -> Tensor:
        return (observations - self.mean) / self.std
