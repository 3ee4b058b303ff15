"""Deterministic Adjoint Matching: its fixed points on a Gaussian exactly, its law, and what it refuses."""

from __future__ import annotations

from typing import Any

import affine
import pytest
import torch
from affine import Affine, Controlled, on_gaussian, riccati
from tiny import iterate
from torch import Tensor
from torch.testing import assert_close

from tiltflow.errors import InputError, NonFiniteError
from tiltflow.flows.field import FunctionField
from tiltflow.laws.gaussian_mixture import QuadraticReward
from tiltflow.laws.law import Law, log_normal
from tiltflow.methods.deterministic_adjoint_matching import DeterministicAdjointMatching
from tiltflow.samplers.chain import Chain
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")

REWARD = QuadraticReward(torch.tensor([affine.LINEAR], dtype=torch.float64), affine.QUADRATIC)


def optimum(chain: Chain, first: int = 0, beta: float = 1.0) -> tuple[Tensor, Tensor]:
    """u_k = slope_k x + shift_k that minimise sum_k h_k u_k^2 / 2 - r(x_K) / beta from step `first` on: Riccati's recursion
    for a control of which a unit moves x_{k+1} by sqrt(h_k)."""
    base, h = on_gaussian(chain), chain.v_scale
    as_if_noisy = Affine(base.gain, base.offset, h.sqrt())
    controls = riccati(as_if_noisy, affine.LINEAR / beta, affine.QUADRATIC / beta)
    late = torch.arange(len(chain)) >= first
    slope, shift = (torch.where(late, each / h.sqrt(), 0.0) for each in controls)
    return slope, shift


def once(method: DeterministicAdjointMatching, tuned: Any, reward: Any = REWARD, **options: Any) -> dict[str, float]:
    x, fields = torch.randn(12, 1, generator=stream(0)), (FunctionField(tuned), FunctionField(affine.velocity))
    (measured,) = iterate(method, *fields, reward, x, stream(1), None, **options)
    return measured


@pytest.mark.parametrize(("control_from", "first"), [(0.0, 0), (0.5, 5)])
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_the_fixed_point_is_the_optimal_control(control_from: float, first: int, beta: float) -> None:
    """There is no noise, so the loss itself is zero there, and nowhere near."""
    method = DeterministicAdjointMatching(num_inference_steps=10, control_from=control_from, beta=beta)
    chain = method.sampling.chain()
    slope, shift = optimum(chain, first, beta)
    measured = once(method, tuned := Controlled(chain, slope, shift))
    assert measured["loss"] < 1e-24
    assert tuned.slope.grad.abs().max() < 1e-12
    for k in range(10):
        away = Controlled(chain, slope, shift + 0.1 * (torch.arange(10) == k))
        assert once(method, away)["loss"] > 0.1 * 0.1**2 / 2
        assert away.shift.grad[k] > 0.01


def test_a_step_counts_by_its_length() -> None:
    """Early steps that should stay as they are, and are away by c, have h_k c^2 and the gradient 2 h_k c."""
    method = DeterministicAdjointMatching(num_inference_steps=10, control_from=0.5, shift=3.0)
    chain = method.sampling.chain()
    first = int((chain.times < 0.5).sum())
    slope, shift = optimum(chain, first)
    early = torch.arange(10) < first
    tuned = Controlled(chain, slope, shift + 0.3 * early)
    once(method, tuned)
    assert_close(tuned.shift.grad[:first], 2 * 0.3 * chain.v_scale[:first])


@pytest.mark.parametrize(
    ("control_from", "mean", "variance"), [(0.0, 0.606394, 0.022195), (0.75, 0.637513, 0.070583), (0.9, 0.667068, 0.141756)]
)
def test_the_law_is_a_transport_and_no_tilt(control_from: float, mean: float, variance: float) -> None:
    """In the limit of small steps, by Richardson's extrapolation, and by quadrature; the tilt is N(0.642857, 0.142857)."""

    def law(steps: int) -> Tensor:
        chain = DeterministicAdjointMatching(num_inference_steps=steps).sampling.chain()
        base = on_gaussian(chain)
        slope, shift = optimum(chain, round(control_from * steps))
        h = chain.v_scale
        return torch.stack(Affine(base.gain + h * slope, base.offset + h * shift, chain.std).law())

    assert (2 * law(1600) - law(800)).tolist() == pytest.approx([mean, variance], abs=3e-5)
    target = DeterministicAdjointMatching(control_from=control_from).target(1)
    exact = target.law(Law.of(lambda x: log_normal(x, 0.7, 0.5)), lambda x: 1.7 * x - 1.5 * x**2)
    assert (exact.mean, exact.variance) == pytest.approx((mean, variance), abs=1e-4)


def test_nothing_is_learned_from_a_reward_that_is_the_same_everywhere() -> None:
    method = DeterministicAdjointMatching(num_inference_steps=6)
    tuned = Controlled(method.sampling.chain(), torch.zeros(6), torch.zeros(6))
    assert once(method, tuned, lambda x: 0 * x[:, 0] + 3)["loss"] == 0
    assert not tuned.slope.grad.any()


def test_micro_batches_and_samples_without_a_reward() -> None:
    method = DeterministicAdjointMatching(num_inference_steps=6)
    found = []
    for size in (None, 5):
        tuned = Controlled(method.sampling.chain(), torch.full((6,), 0.1), torch.full((6,), 0.2))
        limited = lambda x: torch.where(x[:, 0] > 1.2, torch.nan, REWARD(x))  # noqa: E731
        measured = once(method, tuned, limited, micro_batch_size=size, non_finite="drop")
        assert 0 < measured["dropped"] < 11
        found.append((measured, tuned.slope.grad))
    assert found[0][0] == pytest.approx(found[1][0])
    assert_close(found[0][1], found[1][1])


def test_no_adjoint_is_computed_before_the_control() -> None:
    """Of two controlled steps the last takes the gradient at the end, and the one before it one vector-Jacobian product."""
    asked, products = [], []

    def base(x: Tensor, t: Tensor) -> Tensor:
        asked.append(x.requires_grad)
        if x.requires_grad:
            x.register_hook(lambda _: products.append(float(t)))
        return affine.velocity(x, t)

    method = DeterministicAdjointMatching(num_inference_steps=10, control_from=0.8)
    tuned = Controlled(method.sampling.chain(), torch.zeros(10), torch.zeros(10))
    x = torch.randn(3, 1, generator=stream(0))
    list(iterate(method, FunctionField(tuned), FunctionField(base), REWARD, x, stream(1), None))
    assert asked == [True] * 2 + [False] * 8
    assert products == pytest.approx([0.9])


def test_words_and_refusals() -> None:
    target = DeterministicAdjointMatching(beta=0.3).target(1)
    assert (target.reaches, target.temperature, target.beta) == ("none", None, 0.3)
    assert target.words == "the transport with the most E r - beta / 2 (its energy)"
    assert target.caveats[0].startswith("The control of an ODE is a transport of the samples")
    with pytest.raises(InputError, match="are the method 'vgg-flow' now"):
        DeterministicAdjointMatching(value_gradient="predicted")
    with pytest.raises(InputError, match=r"control_from 0.95: the last step is at t = 0.9"):
        DeterministicAdjointMatching(num_inference_steps=10, control_from=0.95).target(1)
    method = DeterministicAdjointMatching(num_inference_steps=6)
    tuned = Controlled(method.sampling.chain(), torch.zeros(6), torch.zeros(6))
    broken = FunctionField(lambda x, t: affine.velocity(x, t) / (t < 0.6))
    with pytest.raises(NonFiniteError, match=r"velocity that is aimed at is not finite at 6 of 6 steps"):
        list(iterate(method, FunctionField(tuned), broken, lambda x: 0 * x[:, 0], torch.randn(3, 1), stream(1), None))
