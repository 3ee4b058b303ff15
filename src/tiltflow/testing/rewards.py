"""A reward as a function: of each sample alone, the same twice, with the gradient that it has."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.rewards import Reward
from tiltflow.rewards.functions.checked import evaluate, value_and_gradient


def check_reward(reward: Reward, x: Tensor, *, gradient: bool = True) -> None:
    """Check that a reward gives a finite number for each sample, of that sample alone, the same twice, and that autograd's
    gradient is the slope that it has.

    Args:
        x: four or more samples [batch, *event] as the model draws them.
        gradient: whether it has one.

    Raises AssertionError; InputError and UserCodeError for what cannot be called at all.
    """
    before = x.clone()
    with torch.no_grad():
        values = evaluate(reward, x)
        again = evaluate(reward, x)
        turned = evaluate(reward, x.flip(0)).flip(0)
        alone = torch.cat([evaluate(reward, x[i : i + 1]) for i in range(len(x))])
    assert torch.equal(x, before), "the reward changes its argument"
    assert torch.equal(values, again), (
        "the reward gives different values for the same samples: is it random, or in training mode?"
    )
    for name, other in (("in another order", turned), ("alone", alone)):
        worst = (values - other).abs().max().item()
        size = values.abs().max().item()
        assert worst <= 1e-4 * (1 + size), f"the reward of a sample changes by up to {worst:.2g} {name}"
    if not gradient:
        return
    _, slopes = value_and_gradient(reward, x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    claimed = (slopes * direction).flatten(1).sum(1).double()
    found = []
    for step in (1e-2, 1e-3):
        with torch.no_grad():
            up, down = (evaluate(reward, x + sign * step * direction).double() for sign in (1, -1))
        found.append((up - down) / (2 * step))
    # the better of a coarse difference, which bends, and a fine one, which rounds
    worst = torch.stack([(claimed - each).abs() for each in found]).amin(0).max().item()
    size = claimed.abs().max().item()
    assert size > 0, "the gradient of the reward is zero everywhere"
    assert worst < 0.02 * size, f"autograd's slope of the reward is off by {worst / size:.1%} of the largest"
