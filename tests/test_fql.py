"""FQL: its gradient against autograd, and the points that it sends noise to in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from affine import velocity
from test_draft import gradients, network, start
from tiny import iterate
from torch import Tensor, nn
from torch.testing import assert_close

from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.methods.fql import Fql
from tiltflow.streams import stream
from tiltflow.training.method import Method
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.trainer import train

pytestmark = pytest.mark.usefixtures("double")
BASE = FunctionField(velocity)
STEPS = 7


def of_base(z: Tensor) -> Tensor:
    """Euler's method on the velocity of the base."""
    for k in range(STEPS):
        z = z + velocity(z, torch.tensor(k / STEPS)) / STEPS
    return z


def value(x: Tensor) -> Tensor:
    return (0.8 * x - 0.6 * x**2 / 2).sum(1)


def test_the_gradient_is_that_of_its_loss() -> None:
    tuned, alpha, z = network(), 1.5, start()
    (measured,) = iterate(Fql(alpha=alpha, num_inference_steps=STEPS), Flow(tuned), BASE, value, z, stream(1), None)
    found = gradients(tuned)
    x, wanted = z + tuned(z, torch.zeros(len(z))), of_base(z)
    distance = (x - wanted).square().mean()
    loss = -value(x).mean() + alpha * distance
    loss.backward()  # type: ignore[no-untyped-call]
    for own, by_definition in zip(found, gradients(tuned), strict=True):
        assert_close(own, by_definition)
    assert measured["loss"] == pytest.approx(loss.item())
    assert measured["reward"] == pytest.approx(value(x).mean().item())
    assert measured["distance_to_base_sample"] == pytest.approx(distance.item())


class Affine(nn.Module):
    """v = w x + u."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.w * x + self.u


def trained(method: Method, steps: int) -> Any:
    network, optimizer = Affine(), Optimizer(learning_rate=0.05, lr_scheduler="cosine", lr_warmup_steps=0)
    more: dict[str, Any] = {"max_train_steps": steps, "optimizer": optimizer}
    list(train(Flow(network), Flow(velocity_module()), method, value, lambda g: torch.randn(200, 1, generator=g), **more))
    return lambda z: (z + network(z, z)).detach()


def velocity_module() -> nn.Module:
    class Exact(nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return velocity(x, time[:, None])

    return Exact()


def test_noise_is_sent_to_the_proximal_point_of_the_bases_sample() -> None:
    """argmax_x 0.8 x - 0.3 x^2 - alpha (x - T)^2 = (2 alpha T + 0.8) / (2 alpha + 0.6)."""
    alpha, z = 0.7, torch.linspace(-2, 2, 5)[:, None]
    one_step = trained(Fql(alpha=alpha, num_inference_steps=STEPS), 250)
    assert_close(one_step(z), (2 * alpha * of_base(z) + 0.8) / (2 * alpha + 0.6), atol=1e-3, rtol=0)
