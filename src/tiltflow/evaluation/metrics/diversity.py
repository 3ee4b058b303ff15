"""How much samples of one prompt, of one class, or of a model without conditions differ, for each way to sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate, effective_number
from tiltflow.evaluation.metrics import Metric, nothing
from tiltflow.evaluation.monitor import spread
from tiltflow.evaluation.samples import Asked

MOST = 256
"""Samples of a group for the Vendi score, whose cost grows with their cube."""

METRICS = (
    Metric(
        "variance",
        "Variance",
        "Sum of the variances of the features of samples of one prompt or class, or of all.",
        better="up",
        source="table",
        compared=True,
    ),
    Metric(
        "vendi",
        "Vendi score",
        "Effective number of different samples of a prompt or class, or among 256 (arXiv 2210.02410).",
        better="up",
        short="Vendi",
        source="table",
        compared=True,
    ),
)

measure = nothing


def squared_distance(found: Tensor, size: int) -> float:
    """Mean squared distance between two samples of a group: twice the variance of [n, ...], `size` of each group in a row."""
    groups = found.flatten(1).double().reshape(-1, size, found[0].numel())
    return 2 * float(groups.var(1).sum(1).mean())


def diversity(found: Tensor, asked: Asked, scale: float | None = None) -> dict[str, float]:
    """How much the samples of a group differ: the sum of the variances of their features, with its standard error, and the
    Vendi score (2210.02410), the effective number of different ones.

    Errors are over groups where these are prompts, a sample of more; within them otherwise, and of the variance alone.

    Args:
        found: features [n, width] or samples [n, ...], those of a group side by side.
        scale: for samples, whose similarity is exp(-d^2 / scale), d their distance. One scale for all that is compared, so that
            the score falls to 1 as samples become one, whichever that is. None for features, whose directions say how alike
            two are.
    """
    x = found.flatten(1).double()
    groups = x.reshape(asked.groups, asked.size, x.shape[1])
    variance, some = groups.var(1).sum(1), groups[:, :MOST]
    if scale is None:
        directions = torch.nn.functional.normalize(some, dim=2)
        kernels = directions @ directions.mT
    else:
        kernels = torch.exp(-torch.cdist(some, some).square() / max(scale, 1e-12))
    vendi = torch.stack([effective_number(kernel) for kernel in kernels])
    if asked.kind == "prompt" and asked.groups > 1:
        return over_prompts(variance).named("variance") | over_prompts(vendi).named("vendi")
    within = torch.stack([spread(each).var() / asked.size for each in groups]).mean()
    error = math.sqrt(within / asked.groups)
    return Estimate(variance.mean().item(), error).named("variance") | {"vendi": vendi.mean().item()}


def over_prompts(values: Tensor) -> Estimate:
    """Mean of values [prompts] and its standard error."""
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))
