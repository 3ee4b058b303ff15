"""Resampling: samples with weights become samples of equal weight."""

# Mutation tests: test_steering.py

from __future__ import annotations

import torch
from torch import Tensor


def systematic(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices [systems, count] of samples that stand for weights exp(log_weights) [systems, n], in random order: each is drawn
    with a probability in proportion to its weight, and a sample of weight w, of a sum of 1, floor or ceil(count w) times
    (systematic resampling, Carpenter, Clifford and Fearnhead 1999).
    """
    rising = log_weights.double().cpu().softmax(1).cumsum(1)
    first = torch.rand(len(rising), 1, generator=generator, dtype=torch.float64)
    levels = (first + torch.arange(count)) / count * rising[:, -1:]
    chosen = torch.searchsorted(rising, levels, right=True).clamp(max=rising.shape[1] - 1)
    order = torch.rand(chosen.shape, generator=generator).argsort(1)
    return chosen.gather(1, order)


def without_replacement(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices [systems, count], all different: the first is drawn by the weights exp(log_weights) [systems, n], each further
    one by those of what is left (the largest of log weights with Gumbel noise, Vieira 2014)."""
    uniform = torch.rand(log_weights.shape, generator=generator, dtype=torch.float64)
    return (log_weights.double().cpu() - (-uniform.log()).log()).topk(count, 1).indices


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """1 / sum w^2 (Kong) of weights exp(log_weights) [systems, n], each row of a sum of 1: [systems], float64."""
    return 1 / log_weights.double().softmax(1).square().sum(1)
