"""Diversity of the samples of a prompt, of a class, or of a model without conditions, for each sampling point."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate, effective_number
from tiltflow.evaluation.metrics import Metric, nothing
from tiltflow.evaluation.monitor import spread
from tiltflow.evaluation.samples import Asked

MOST = 256
"""Samples of a group for the Vendi score, whose cost is cubic in them."""

METRICS = (
    Metric(
        "variance",
        "Variance",
        "Total variance of the features of the samples of a prompt or class, or of all samples.",
        better="up",
        source="table",
        compared=True,
    ),
    Metric(
        "vendi",
        "Vendi score",
        "Effective number of different samples of a prompt or class, or among 256 samples (arXiv 2210.02410).",
        better="up",
        short="Vendi",
        source="table",
        compared=True,
    ),
)

measure = nothing


def squared_distance(found: Tensor, size: int) -> float:
    """Return the mean squared distance between two samples of a group: twice the variance of [n, ...], in groups of `size`."""
    groups = found.flatten(1).double().reshape(-1, size, found[0].numel())
    return 2 * float(groups.var(1).sum(1).mean())


def diversity(found: Tensor, asked: Asked, scale: float | None = None) -> dict[str, float]:
    """Measure the diversity of the samples of a group: the total variance of their features, and the Vendi score
    (arXiv 2210.02410), the effective number of different samples.

    For prompts, standard errors are over the groups; otherwise within the groups, and for the variance only.

    Args:
        found: features [n, width] or samples [n, ...], in consecutive groups.
        scale: of the similarity exp(-d^2 / scale) of samples at distance d. One scale for all models that are compared, so that
            the score falls to 1 as samples become equal. None for features, whose similarity is the cosine.
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
    """Return the mean of values [prompts] and its standard error."""
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))
