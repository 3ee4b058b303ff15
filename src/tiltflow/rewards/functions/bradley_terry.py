r"""The Bradley-Terry model of choices between two: P(first is chosen) = sigmoid(w . (f_first - f_second)).

A logistic regression on differences of features, without an intercept, with the penalty l2 |w|^2 / 2: convex, so it has one
solution, and it is the mode of the posterior under the prior w ~ N(0, 1 / l2). A tie counts as half a vote for either.
"""

# Mutation tests: test_preference.py

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STRENGTHS = tuple(10.0 ** (k / 2) for k in range(-6, 9))
"""Penalties that are tried, in units in which differences have mean square 1."""
MOST_STEPS = 100


def fit(differences: Tensor, outcomes: Tensor, l2: float) -> Tensor:
    """The weights [width], by Newton's method.

    Args:
        differences: features of the first less those of the second, float64 [votes, width].
        outcomes: 1 where the first was chosen, 0 where the second was, 1/2 for ties [votes].
    """
    w = differences.new_zeros(differences.shape[1])
    for _ in range(MOST_STEPS):
        gradient, hessian = _derivatives(differences, outcomes, l2, w)
        step = torch.linalg.solve(hessian, gradient)
        # the decrement bounds the distance to the optimum; halved steps never diverge, whole ones converge quadratically
        decrement = float(gradient @ step)
        size, before = 1.0, loss(differences, outcomes, l2, w)
        while loss(differences, outcomes, l2, w - size * step) > before - 0.25 * size * decrement and size > 1e-8:
            size /= 2
        w = w - size * step
        if decrement < 1e-18:
            break
    return w


def loss(differences: Tensor, outcomes: Tensor, l2: float, w: Tensor) -> float:
    """The sum of -log P of the votes, and the penalty."""
    margins = differences @ w
    return float((torch.nn.functional.softplus(margins) - outcomes * margins).sum() + l2 / 2 * w @ w)


def _derivatives(differences: Tensor, outcomes: Tensor, l2: float, w: Tensor) -> tuple[Tensor, Tensor]:
    p = (differences @ w).sigmoid()
    hessian = (differences * (p * (1 - p))[:, None]).T @ differences
    hessian.diagonal().add_(l2)
    return differences.T @ (p - outcomes) + l2 * w, hessian


def left_out(differences: Tensor, outcomes: Tensor, l2: float) -> Tensor:
    """The margin w . d of each vote [votes] by the weights without it: one Newton step from those of all, without the vote.

    With h = d' H^-1 d and s = p (1 - p) it is m + h (p - y) / (1 - s h).
    """
    w = fit(differences, outcomes, l2)
    _, hessian = _derivatives(differences, outcomes, l2, w)
    margins = differences @ w
    p = margins.sigmoid()
    h = (differences * torch.linalg.solve(hessian, differences.T).T).sum(1)
    without: Tensor = margins + h * (p - outcomes) / (1 - p * (1 - p) * h)
    return without


def strength(differences: Tensor, outcomes: Tensor, tried: Sequence[float] = STRENGTHS) -> float:
    """The penalty under which votes are likeliest that are left out, one at a time."""

    def surprise(l2: float) -> float:
        margins = left_out(differences, outcomes, l2)
        return float((torch.nn.functional.softplus(margins) - outcomes * margins).mean())

    return min(tried, key=surprise)


def spanned(differences: Tensor) -> tuple[Tensor, Tensor]:
    """(differences in an orthonormal basis of their span [votes, rank], the basis [width, rank]), in which the fit is the same
    and small: the penalty keeps weights in the span."""
    _, values, basis = torch.linalg.svd(differences, full_matrices=False)
    basis = basis[values > 1e-10 * values.amax().clamp(min=1e-300)].T
    return differences @ basis, basis


def held_out(
    differences: Tensor, outcomes: Tensor, generator: torch.Generator, parts: int = 5, l2: float | None = None
) -> Tensor:
    """The margin of each vote [votes] by a fit, its penalty chosen anew, to the votes of all other parts."""
    margins = torch.empty_like(outcomes)
    for part in torch.randperm(len(outcomes), generator=generator).tensor_split(parts):
        rest = torch.ones(len(outcomes), dtype=torch.bool)
        rest[part] = False
        some, basis = spanned(differences[rest])
        chosen = strength(some, outcomes[rest]) if l2 is None else l2
        margins[part] = differences[part] @ basis @ fit(some, outcomes[rest], chosen)
    return margins


def share_interval(right: float, count: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval, of 95 %, of a share of which `right` of `count` were seen.

    >>> [round(edge, 3) for edge in share_interval(8, 10)]
    [0.49, 0.943]
    """
    centre, spread = right + z * z / 2, z * (right * (count - right) / count + z * z / 4) ** 0.5
    return (centre - spread) / (count + z * z), (centre + spread) / (count + z * z)
