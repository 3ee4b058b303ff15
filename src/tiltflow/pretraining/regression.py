"""The regression target of flows and of denoisers: the network's own prediction at a point of its Gaussian path."""

# Mutation tests: test_pretrain.py

from __future__ import annotations

from torch import Tensor

from tiltflow.flows.interpolant import Coefficients, PredictionType, expand, mixture_weights


def point_and_target(c: Coefficients, prediction: PredictionType, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Point alpha x_1 + beta x_0 of the path and prediction a x_1 + b x_0 there, both [batch, *event].

    Args:
        c: coefficients of the path at one time per sample.
        x0: noise [batch, *event].
        x1: data [batch, *event].
    """
    a, b = (expand(weight, x1) for weight in mixture_weights(prediction, c))
    return expand(c.alpha, x1) * x1 + expand(c.beta, x1) * x0, a * x1 + b * x0
