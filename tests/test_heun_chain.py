"""Memoryless paths by Heun's method: their order, their noise, what they forget, and the weights of their paths."""

from __future__ import annotations

from itertools import pairwise

import affine
import pytest
import torch
from affine import Affine
from torch import Tensor

from tiltflow.control.path_weights import draw_paths, log_proposal
from tiltflow.flows.field import FunctionField, Velocity
from tiltflow.laws.chain_optimum import tilted_chain
from tiltflow.laws.gaussian_mixture import QuadraticReward, mixture
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.heun_chain import heun_chain
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream


def steps_of(chain: Chain, velocity: Velocity = affine.velocity) -> Affine:
    """The chain of a field that is affine in x, by what it makes of 0 and 1."""
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    after = torch.stack([chain.mean(k, x, chain.velocity(k, velocity, x)) for k in range(len(chain))])
    return Affine(after[:, 1] - after[:, 0], after[:, 0], chain.std)


def test_the_law_of_the_ends_is_of_second_order() -> None:
    """On N(0.7, 0.25), and, with two modes, of the tilt of the ends."""
    errors = [abs(steps_of(heun_chain(time_grid(steps))).law()[1].item() - affine.VARIANCE) for steps in (20, 40, 80)]
    assert errors[0] < 0.004
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([4, 4], abs=0.05)
    base = mixture(torch.tensor([[-1.5], [1.5]]).double(), (0.6, 0.4), (0.15**0.5, 0.3**0.5))
    reward = QuadraticReward(torch.tensor([0.8]).double(), 0.7)
    left = [
        tilted_chain(heun_chain(time_grid(steps)), base, reward, 0.6).sliced_w2(base.tilt(reward, 0.6)) for steps in (15, 30)
    ]
    assert left == pytest.approx([0.0177, 0.0055], abs=1e-4)


@pytest.mark.parametrize("spacing", ["even", "middle"])
def test_samples_that_are_all_one_point_have_exact_marginals_at_all_times(spacing: str) -> None:
    """Their ODE goes straight, and Heun's method makes no error: what is left is the noise that comes back."""
    times = time_grid(9, spacing=spacing)  # type: ignore[arg-type]
    steps = steps_of(heun_chain(times), lambda x, t: (0.7 - x) / (1 - t))
    for k in range(1, 10):
        part = Affine(steps.gain[:k], steps.offset[:k], steps.std[:k])
        mean, variance = part.law()
        assert mean.item() == pytest.approx(0.7 * times[k].item())
        assert variance.item() == pytest.approx((1 - times[k].item()) ** 2, abs=1e-12)


def test_the_noise_is_that_of_the_memoryless_sde_and_the_last_step_has_none() -> None:
    chain, inner, h = heun_chain(time_grid(1000)), slice(300, 900), 1e-3
    t = chain.times[1:][inner] + h / 2  # the middle of what a step goes back
    torch.testing.assert_close(chain.std[inner] ** 2, 2 * h * (1 - t) / t, rtol=0.005, atol=0)
    assert [each.item() for each in (chain.std[-1], chain.past[-1], chain.x_scale[-1])] == [0, 1, 1]
    assert bool((chain.std[:-1] > 0).all())
    assert bool((chain.past[:-1] < 1).all())


def test_the_ends_forget_the_start_as_steps_shrink() -> None:
    left = [steps_of(heun_chain(time_grid(steps))).gain.prod().item() for steps in (30, 60, 120)]
    assert left[0] < 0.01
    assert [a / b for a, b in pairwise(left)] == pytest.approx([2, 2], abs=0.1)


def test_a_step_asks_for_the_velocity_at_its_start_and_past_its_end_and_once_in_the_last() -> None:
    chain, asked = heun_chain(time_grid(4)), list[float]()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.item())
        return x

    for k in range(4):
        chain.velocity(k, velocity, torch.ones(1))
    assert asked == [0, 0.5, 0.25, 0.75, 0.5, 0.875, 0.75]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_weights_of_its_paths_lead_to_the_law_of_the_bases_own_ends(share: float) -> None:
    chain, size = heun_chain(time_grid(10)), 40_000
    generator = stream(0, "paths")
    x = torch.randn(size, 1, generator=generator, dtype=torch.float64)
    of_base = torch.arange(size) < round(share * size)
    base = FunctionField(affine.velocity)
    tuned = FunctionField(lambda x, t: affine.velocity(x, t) + 0.4 - 0.2 * x)
    found = draw_paths(chain, tuned, base, x, of_base, generator)
    assert found.log_ratio is not None
    weights = (-log_proposal(found.log_ratio, torch.tensor(share))).exp()
    mean, variance = steps_of(chain).law()
    for values, exact in ((torch.ones(size), 1.0), (found.ends[:, 0], mean), ((found.ends[:, 0] - mean) ** 2, variance)):
        each = weights * (values - exact) if exact != 1.0 else weights - 1
        error = each.std() / size**0.5
        assert abs(each.mean()) < 4 * error + 1e-12
        assert error < 0.02
    if share == 0:
        assert abs(found.ends.mean() - mean) > 0.1  # which is another law than that of the paths that were drawn


def test_in_64_dimensions_the_weights_of_modes_are_those_of_the_base() -> None:
    """The case of `docs/exactness.md`, whose modes are told apart by the norm, at as many evaluations."""
    means = torch.zeros(3, 64, dtype=torch.float64)
    means[0, 0], means[1, :2], means[2, 1:3] = 2, torch.tensor([-1.0, 2.0]), torch.tensor([-1.0, 2.0])
    law = mixture(means, (0.5, 0.3, 0.2), (0.4, 0.6, 0.8))
    base = FunctionField(lambda x, t: law.velocity(x, t))
    shares = {}
    for name, chain in (("memoryless", Sampling(num_inference_steps=60).chain()), ("heun", heun_chain(time_grid(30)))):
        generator = stream(0, "64")
        x = torch.randn(4000, 64, generator=generator, dtype=torch.float64)
        ends = draw_paths(chain, None, base, x, torch.ones(4000, dtype=torch.bool), generator).ends
        shares[name] = law.velocity_and_responsibilities(ends, torch.ones((), dtype=torch.float64))[1][:, 0].mean().item()
    assert abs(shares["heun"] - 0.5) < 4 * (0.25 / 4000) ** 0.5
    assert abs(shares["memoryless"] - 0.5) > 6 * (0.25 / 4000) ** 0.5
