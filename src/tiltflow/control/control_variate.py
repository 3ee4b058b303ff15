r"""A control variate for regressions on what a path does next: the noise that is still to come.

Given x_k, the noise z_k = sum_{j >= k} std_j eps_j of the steps to come has mean zero, whatever the chain and its control.
It is what x_K is away from its prediction at x_k, as far as steps hand noise on unchanged, and late in a path what the adjoint
is away from its mean is nearly proportional to it: the reward's gradient at x_K is what it is at the prediction, plus the
reward's curvature times z_k. So a multiple of z_k is subtracted from the target of step k. The multiple that sample i gets is
that of a regression over all other samples, c_-i, which is independent of z_k of sample i: the mean of what is subtracted,
E[c_-i] E[z_k | x_k], is zero.
"""

# Mutation tests: test_control_variate.py

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tiltflow.samplers.rollout import Trajectory


def noise_to_come(path: Trajectory) -> Iterator[tuple[int, Tensor]]:
    """z_k of each step of a path, (k, [batch, *event]), from the last one to the first: there is no room for all."""
    total = torch.zeros_like(path.states[0], dtype=torch.float64)
    for k in range(len(path.velocities) - 1, -1, -1):
        total = total + path.chain.std[k].item() * path.noise(k)
        yield k, total.to(path.states.like)


def predicted(residuals: Tensor, variate: Tensor, together: Callable[[Tensor], Tensor] = lambda own: own) -> Tensor:
    """What `variate` predicts of the residuals of each step, by a least-squares multiple of all other samples: both
    [steps, batch, *event]. Zero where there is no other sample.

    Args:
        together: numbers [steps, batch] of these samples -> those of all samples whose regression it is; the same by default.
    """
    flat = variate.flatten(2).double()
    products, squares = (flat * residuals.flatten(2)).sum(2), flat.square().sum(2)
    total = together(squares).sum(1, keepdim=True)
    others = torch.maximum(total - squares, 1e-12 * total + 1e-300)  # not less than rounding leaves
    multiples = (together(products).sum(1, keepdim=True) - products) / others
    return (multiples.to(variate).reshape(*multiples.shape, *(1 for _ in variate.shape[2:]))) * variate
