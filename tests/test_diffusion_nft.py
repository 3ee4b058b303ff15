"""DiffusionNFT: its loss as published, its rounds in closed form, and where they settle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from lines import NORMAL
from perfect_fit import BASE, CPU, Affine, after, first_gradient, fitted_round, slope
from tiny import iterate
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.laws.forward_process import explicit_rounds, ram
from tiltflow.methods.diffusion_nft import DiffusionNft
from tiltflow.methods.regressions.drawn_samples import Rounds
from tiltflow.problems.two_modes import TwoModes
from tiltflow.streams import stream

FREE: dict[str, Any] = {"beta": 1e-9, "neighbours": 64}
"""Without a penalty."""


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x[:, 0])


def test_the_gradient_is_that_of_the_published_loss() -> None:
    """p |b v + (1 - b) v_old - u|^2 + (1 - p) |(1 + b) v_old - b v - u|^2, away from v_old, by autograd; many noises."""
    b, beta, most, count = 0.7, 0.3, 1.5, 200_000
    tuned, old = Affine(), Affine()
    tuned.offset.data -= 0.5
    old.slope.data -= 0.2
    method = DiffusionNft(
        beta=beta, interpolation=b, advantage_clip=most, solver="euler", num_inference_steps=5, regression_batch_size=count
    )
    state = Rounds(CPU, old=[p.detach().clone() for p in (old.offset, old.slope)])
    x = torch.randn(64, 1, generator=stream(0, "x"))
    steps = iterate(method, Flow(tuned), Flow(BASE), slope, x, stream(0), state, parameters=(tuned.offset, tuned.slope))
    next(steps)
    found = torch.stack([p.grad.sum() for p in (tuned.offset, tuned.slope)])  # type: ignore[union-attr]
    tuned.zero_grad()
    x1 = x
    with torch.no_grad():
        for k in range(5):
            x1 = x1 + old(x1, torch.full((64,), k / 5)) / 5
    a = slope(x1) - slope(x1).mean()
    p = ((a / a.std(correction=0)).clamp(-most, most) / most + 1) / 2
    assert p.max() == 1  # some are clipped
    t = torch.rand(count, generator=stream(1))
    which, x0 = torch.arange(count) % 64, torch.randn(count, 1, generator=stream(2))
    xt, u = t[:, None] * x1[which] + (1 - t[:, None]) * x0, x1[which] - x0
    v, before, good = tuned(xt, t), old(xt, t).detach(), p[which][:, None]
    better, worse = b * v + (1 - b) * before - u, (1 + b) * before - b * v - u
    loss = most * (good * better.square() + (1 - good) * worse.square()) / b + beta * (v - BASE(xt, t)).square()
    loss.mean().backward()
    expected = torch.stack([p.grad.sum() for p in (tuned.offset, tuned.slope)])  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.03)  # over seeds .01
    assert expected.abs().min() > 0.1


def stein() -> float:
    """E tanh(x) x = E tanh'(x) of N(0, 1): the slope of tanh that an affine field sees."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return float((weights / np.cosh(nodes) ** 2).sum() / weights.sum())


def test_a_round_tilts_by_twice_the_reward_over_the_interpolation() -> None:
    """N(0, 1) under p = 1/2 + tanh(x) / 2, b = 1, is one explicit step of tanh: mean .594, variance .909, by Monte Carlo
    +-.003, for a field that is any function of x. Among affine fields an odd reward moves the mean alone."""
    law = explicit_rounds(NORMAL, np.tanh, 1.0, 1)
    assert (law.mean, law.variance) == (pytest.approx(0.5937, abs=3e-3), pytest.approx(0.909, abs=3e-3))
    method = DiffusionNft(advantages="centered", advantage_clip=1.0, **FREE)
    tuned, state = Affine(), Rounds(CPU)
    fitted_round(method, tuned, tanh, state)
    assert tuned.law == (pytest.approx(stein(), abs=0.02), pytest.approx(1, abs=0.02))
    # twice as far at half the interpolation
    assert after(method.model_copy(update={"interpolation": 0.5}), tanh, 1)[0] == pytest.approx(2 * stein(), abs=0.04)


def test_rounds_go_on_without_end_in_units_of_the_reward_s_deviation() -> None:
    """1 / 5 each, whatever the scale of a linear reward, which explicit rounds tilt exactly."""
    tuned, state = Affine(), Rounds(CPU)
    method = DiffusionNft(old_decay=0.0, **FREE)
    for i in range(2):
        fitted_round(method, tuned, lambda x: 7 * slope(x), state, i)
        assert tuned.law == pytest.approx((0.2 * (i + 1), 1), abs=0.03)


def test_clipped_advantages_count_by_the_samples_within_the_clip() -> None:
    """E[c(x) x] = E[c'(x)] of N(0, 1), by Stein's lemma: P(|x| < 1) for c = x, clipped at 1."""
    mean, variance = after(DiffusionNft(advantage_clip=1.0, **FREE), slope, 1)
    assert mean == pytest.approx(math.erf(0.5**0.5), abs=0.02)
    assert variance == pytest.approx(1, abs=0.03)


def test_a_penalty_settles_where_ram_does() -> None:
    """Under a linear reward a round around v_old, of c b = 2 beside the penalty 2, goes half of what is left of the way to the
    tilt: N(1/2, 1) for beta = 2."""
    tuned, state = Affine(), Rounds(CPU)
    method = DiffusionNft(advantages="centered", beta=2.0, advantage_clip=20.0, interpolation=0.1, neighbours=64, old_decay=0.0)
    means = []
    for i in range(3):
        fitted_round(method, tuned, slope, state, i)
        means.append(tuned.law[0])
    assert means == [pytest.approx(each, abs=0.025) for each in (0.25, 0.375, 0.4375)]


@pytest.mark.slow
def test_its_law_is_that_of_ram_within_the_clip() -> None:
    problem = TwoModes()
    base, reward = problem.law(), problem.reward_at
    law = DiffusionNft(advantages="centered", beta=2.5).target(1).law(base, reward)
    assert law.expectation(np.tanh) == pytest.approx(ram(base, reward, 2.5).expectation(np.tanh), abs=1e-6)
    small = DiffusionNft(advantages="centered", beta=2.5, advantage_clip=0.5).target(1).law(base, reward)
    assert small.expectation(np.tanh) < law.expectation(np.tanh) - 0.02


def test_the_model_that_draws_samples_follows() -> None:
    """v_old <- m v_old + (1 - m) v, m = .2, .4, .5 after the first batches."""
    tuned, state = Affine(), Rounds(CPU)
    method = DiffusionNft(num_inference_steps=2, old_decay_rate=0.2)
    expected = torch.zeros(())
    for i, stays in enumerate((0.0, 0.2, 0.4, 0.5, 0.5)):
        x = torch.linspace(-1, 1, 8)[:, None]
        steps = iterate(method, Flow(tuned), Flow(BASE), slope, x, stream(i), state, parameters=(tuned.offset, tuned.slope))
        list(steps)
        tuned.offset.data += 0  # what the optimizer would do is done before the next batch
        expected = stays * expected + (1 - stays) * tuned.offset.data.mean()
        assert state.old[0].mean() == pytest.approx(float(expected), abs=1e-6)
        tuned.offset.data += 0.1
        again = Rounds(CPU)
        again.load_state_dict(state.state_dict())
        assert torch.equal(again.old[0], state.old[0])


def test_nothing_is_learned_from_a_reward_that_is_the_same_everywhere() -> None:
    assert (first_gradient(DiffusionNft(num_inference_steps=5), lambda x: torch.full((len(x),), 0.3)) == 0).all()


def test_words_and_refusals() -> None:
    target = DiffusionNft().target(1)
    assert (target.reaches, DiffusionNft().temperature) == ("none", None)
    assert "there is no law at which this settles" in target.caveats[0]
    centred = DiffusionNft(advantages="centered", beta=0.5)
    assert (centred.target(1).reaches, centred.temperature, centred.at_temperature(0.3).beta) == ("first-order", 0.5, 0.3)
    assert DiffusionNft().optimizer_defaults == {"learning_rate": 3e-4}
    with pytest.raises(InputError, match="no temperature with standardized advantages"):
        DiffusionNft().at_temperature(0.5)
