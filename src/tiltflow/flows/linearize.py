"""The value and the Jacobian of a velocity field, by one evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tiltflow.flows.field import VelocityField


def linearize(flow: VelocityField, x: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(v, pullback) of `flow` at (x [batch, *event], t): pullback(c) = J^T c, by the one backward pass that v's graph allows.

    The weights are the field's own during the pullback too: activation checkpointing runs the forward pass once more there,
    and would otherwise differentiate the tuned network in place of its base.
    """
    x = x.detach().requires_grad_()
    with flow.own_weights(), torch.enable_grad():
        v = flow(x, t)

    def pullback(cotangent: Tensor) -> Tensor:
        with flow.own_weights():
            (product,) = torch.autograd.grad(v, x, cotangent)
        return product

    return v.detach(), pullback
