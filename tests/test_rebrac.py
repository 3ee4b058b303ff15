"""ReBRAC: its gradient against autograd, the one action in closed form, and the price that its critics put on another's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from replays import replay
from test_draft import gradients, network, start
from test_fql import BASE, STEPS, of_base, trained, value
from test_q_function import STILL, Stub, q_reward
from tiny import iterate
from torch.testing import assert_close

from tiltflow.flows.flow import Flow
from tiltflow.methods.rebrac import Rebrac
from tiltflow.policies.transitions import load_transitions
from tiltflow.streams import stream


@pytest.mark.usefixtures("double")
def test_the_gradient_is_that_of_its_loss() -> None:
    tuned, alpha, x = network(), 1.5, start()
    method = Rebrac(alpha=alpha, num_inference_steps=STEPS)
    (measured,) = iterate(method, Flow(tuned), BASE, value, x, stream(1), None, micro_batch_size=3)
    found = gradients(tuned)
    actions, behaviour = x + tuned(x, torch.zeros(len(x))), of_base(torch.randn(x.shape, generator=stream(1)).double())
    size = value(actions).detach().abs().mean()
    (-(value(actions) / size).mean() + alpha * (actions - behaviour).square().sum(1).mean()).backward()
    for own, published in zip(found, gradients(tuned), strict=True):
        assert_close(own, size * published)
    assert measured["reward"] == pytest.approx(value(actions).mean().item())


@pytest.mark.usefixtures("double")
def test_all_noise_is_sent_to_one_action() -> None:
    """The mean of (x - a)^2 over all a is (x - m)^2 and a number, m the mean of the discrete sampler: x is where
    r'(x) / |r(x)| = 2 alpha (x - m)."""
    alpha, mean = 0.7, of_base(torch.zeros(1)).item()
    low, high = mean, 0.8 / 0.6
    for _ in range(60):
        x = (low + high) / 2
        rises = (0.8 - 0.6 * x) / abs(0.8 * x - 0.3 * x**2) > 2 * alpha * (x - mean)
        low, high = (x, high) if rises else (low, x)
    found = trained(Rebrac(alpha=alpha, num_inference_steps=STEPS), 250)(torch.tensor([[-1.0], [0.0], [1.0]]))
    assert low - mean > 0.2
    assert_close(found, torch.full((3, 1), low), atol=0.03, rtol=0)


def test_the_squared_distance_is_of_steps_that_were_taken(tmp_path: Path) -> None:
    actions = np.array([[0.1, 0.2], [0.3, 0.4], [9, 9], [0.5, 0.6], [9, 9]])
    data = load_transitions(replay(tmp_path / "data.npz", episodes=(3, 2), actions=actions))
    found = data.squared_distance(torch.tensor([0, 1, 2, 3, 4]), torch.zeros(5, 4))
    assert found.tolist() == pytest.approx([0.01 + 0.04 + 0.09 + 0.16, 0.09 + 0.16, 0, 0.25 + 0.36, 0])


def test_the_targets_with_a_price_by_hand(tmp_path: Path) -> None:
    """Of a policy that keeps its noise, clipped: what comes after the first chunk has an action of the data, after the second
    none, and after the third nothing counts."""
    masks = np.array([1, 1, 1, 1, 0, 1])
    path = replay(tmp_path / "data.npz", episodes=(3, 3), action=1, masks=masks)
    rows, found = torch.tensor([0, 1, 4]), []
    for price in (0.0, 0.3):
        reward = q_reward(path, horizon=1, discount=0.5, distance_price=price)
        reward.network["target"] = Stub()  # type: ignore[index, operator]
        found.append(reward.targets(rows, STILL, stream(0)))
    ours = torch.randn(3, 1, generator=stream(0)).clamp(-1, 1)
    away = (ours[0] - reward.transitions.actions[1]).square().item()
    assert_close(found[1], found[0] - torch.tensor([0.5 * 0.3 * away, 0, 0]))
