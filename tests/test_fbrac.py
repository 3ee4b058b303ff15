"""FBRAC: its two gradients, each in closed form, and where they are in balance."""

from __future__ import annotations

import pytest
import torch
from affine import on_gaussian, velocity
from test_draft import gradients, network, reward, start
from tiny import iterate
from torch import Tensor, nn
from torch.testing import assert_close

from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.methods.draft import Draft
from tiltflow.methods.fbrac import Fbrac
from tiltflow.streams import stream
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.trainer import train

pytestmark = pytest.mark.usefixtures("double")
BASE = FunctionField(lambda x, t: velocity(x, t[..., None]))


class Shifted(nn.Module):
    """The velocity of the base and a number."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return velocity(x, time[:, None]) + self.shift


def test_without_a_price_it_is_the_gradient_through_the_whole_sampler() -> None:
    tuned = network()
    found = []
    for method in (Fbrac(alpha=0, num_inference_steps=5), Draft(truncation=None, num_inference_steps=5)):
        (measured,) = iterate(method, Flow(tuned), BASE, reward, start(), stream(1), None)
        found.append((measured["reward"], gradients(tuned)))
    assert found[0][0] == found[1][0]
    assert_close(found[0][1], found[1][1])


def test_the_price_of_another_velocity() -> None:
    """alpha shift^2 wherever it is taken, of gradient 2 alpha shift: the reward has none here."""
    tuned = Shifted(0.3)
    flat = lambda x: 0 * x[:, 0]  # noqa: E731
    x = torch.randn(6, 1, generator=stream(0))
    (measured,) = iterate(Fbrac(alpha=2.0), Flow(tuned), BASE, flat, x, stream(1), None)
    assert measured["cloning_loss"] == pytest.approx(2 * 0.3**2)
    assert measured["loss"] == pytest.approx(2 * 0.3**2)
    assert tuned.shift.grad is not None
    assert tuned.shift.grad.item() == pytest.approx(2 * 2 * 0.3)


def test_where_reward_and_price_are_in_balance() -> None:
    """A shift of the velocity moves the end by c, of the steps' gains; slope c shift - alpha shift^2 is largest at
    slope c / (2 alpha)."""
    method, slope = Fbrac(alpha=1.5, num_inference_steps=6), 0.9
    chain, moved = method.sampling.chain(), torch.zeros(())
    for gain, step in zip(on_gaussian(chain).gain, chain.v_scale, strict=True):
        moved = gain * moved + step
    tuned, base = Shifted(0.0), Shifted(0.0).requires_grad_(False)
    optimizer = Optimizer(learning_rate=0.05, lr_scheduler="cosine", lr_warmup_steps=0)
    draw = lambda g: torch.randn(16, 1, generator=g)  # noqa: E731
    list(train(Flow(tuned), Flow(base), method, lambda x: slope * x[:, 0], draw, max_train_steps=180, optimizer=optimizer))
    assert tuned.shift.item() == pytest.approx((slope * moved / (2 * 1.5)).item(), rel=1e-3)
