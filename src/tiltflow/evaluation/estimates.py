"""Estimates with standard errors, and statistics of samples: entropy, variance, effective number."""

# Mutation tests: test_evaluation.py

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow import processes


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"

    def named(self, name: str) -> dict[str, float]:
        """Return the two entries of a summary."""
        return {name: self.value, f"{name}_error": self.standard_error}


def mean_estimate(values: Tensor) -> Estimate:
    """Return the mean of values [n] and its standard error."""
    return Estimate(values.double().mean().item(), (values.double().std() / len(values) ** 0.5).item())


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return integers [n] as one-hot rows [n, classes], float64."""
    return torch.nn.functional.one_hot(labels, classes).double()


def entropy(histogram: Tensor) -> float:
    """Return -sum p log p of a histogram [classes], in nats: at most log(classes), 0 if only one class is left."""
    return float(torch.special.entr(histogram.double()).sum())


def total_variance(features: Tensor) -> float:
    """Return E|f - E f|^2 of features [n, d], the trace of their covariance."""
    return float(features.double().var(0, correction=0).sum())


def effective_number(kernel: Tensor) -> Tensor:
    """Return the Vendi score (arXiv 2210.02410), the effective number of different samples: exp of the entropy of the
    eigenvalues of K / n, for similarities K [n, n] with ones on the diagonal. 1 if all samples are equal, n if all similarities
    are 0."""
    eigenvalues: Tensor = torch.linalg.eigvalsh(kernel / len(kernel)).clamp(min=0)
    entropy_of_them: Tensor = torch.special.entr(eigenvalues).sum()
    return entropy_of_them.exp()


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, size: int, device: str = "cpu") -> Tensor:
    """Apply `function` to copies of x [n, ...] in batches of `size` on `device`, shared among all processes; the results [n,
    ...] are on the CPU, without gradients."""
    found = [function(x[part].to(device, copy=True)).clone() for part in processes.shares(len(x), size)]
    return processes.gathered(found, len(x)).cpu()
