"""Utilities of your own: autograd's first variation of any function of a law, against formulas and the change of the
function."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltflow.errors import InputError, UserCodeError
from tiltflow.rewards.functions.checked import value_and_gradient
from tiltflow.utilities.entropic_risk import EntropicRisk
from tiltflow.utilities.estimation.known import Known
from tiltflow.utilities.function import Function, of_law
from tiltflow.utilities.mean_variance import MeanVariance


def risk(x: Tensor, weights: Tensor, rewards: Tensor) -> Tensor:
    """The entropic risk at 0.8."""
    return ((0.8 * rewards).exp() @ weights.to(rewards)).log() / 0.8


def risk_of_samples(x: Tensor, rewards: Tensor) -> Tensor:
    return (0.8 * rewards).exp().mean().log() / 0.8


def spread(x: Tensor) -> Tensor:
    """The trace of the covariance: of the samples as a set."""
    return (x - x.mean(0)).square().sum(1).mean()


def fisher(x: Tensor, weights: Tensor, scores: Tensor) -> Tensor:
    return weights.to(x) @ scores.square().sum(1)


def broken(x: Tensor) -> Tensor:
    raise ValueError("no")


def reward(x: Tensor) -> Tensor:
    return x[:, 0].sin() + (x[:, 0] * x[:, 1]).cos() / 2


def known(count: int = 300, seed: int = 0) -> Known:
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Known(x, reward={"reward": reward})


def function(name: str) -> Function:
    return Function(path=f"test_utility_function:{name}")


NEW = torch.randn(6, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_with_weights_it_is_exact() -> None:
    """As the built-in utility: values up to a constant, gradients, at samples and at new points; value and error too."""
    at = replace(known(), weights=torch.rand(300, generator=torch.Generator().manual_seed(1)) + 0.1)
    ours, built_in = function("risk"), EntropicRisk(risk=0.8)
    for x in (NEW, at.x):
        one, two = (value_and_gradient(each.first_variation(at), x) for each in (ours, built_in))
        torch.testing.assert_close(one[0] - one[0][0], two[0] - two[0][0])
        torch.testing.assert_close(one[1], two[1])
    assert ours.value(at).value == pytest.approx(built_in.value(at).value)
    assert ours.value(at).standard_error == pytest.approx(built_in.value(at).standard_error)
    assert ours.reward_names == ("reward",)
    assert ours.needs == ()


def test_without_weights_it_is_right_up_to_one_over_n() -> None:
    """The sensitivity curve: its error halves where the number of samples doubles."""
    ours, built_in = function("risk_of_samples"), EntropicRisk(risk=0.8)
    errors = []
    for count in (200, 400):
        at = known(count)
        one, two = (value_and_gradient(each.first_variation(at), NEW)[1] for each in (ours, built_in))
        errors.append(float((one - two).norm() / two.norm()))
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)


def test_the_gradient_at_a_sample_is_n_times_that_of_the_mean() -> None:
    """n dF / dx_i, of the function of all samples by autograd: with one more point, of a law with one more."""
    at = known(300)
    x = at.x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(spread(x), x)
    slope = value_and_gradient(function("spread").first_variation(at), at.x)[1]
    torch.testing.assert_close(slope, 300 * plain, rtol=0.01, atol=0.01)
    torch.testing.assert_close(300 * plain, 2 * (at.x - at.x.mean(0)))


def test_its_values_are_the_change_of_the_function() -> None:
    """When weights move from equal ones toward others."""
    at = known(50)
    toward = torch.rand(50, generator=torch.Generator().manual_seed(3)).double()
    toward /= toward.sum()
    ours = function("risk")

    def moved(step: float) -> float:
        return ours.value(replace(at, weights=(1 - step) * at.p + step * toward)).value

    expected = (moved(1e-4) - moved(-1e-4)) / 2e-4
    assert float((toward - at.p) @ ours.first_variation(at)(at.x)) == pytest.approx(expected, rel=1e-6)


def test_the_score_does_not_change_with_the_law() -> None:
    """E |s|^2 of N(0, v) is 1 / v, with the first variation -|s|^2 - 2 s' = -(x / v)^2 + 2 / v. Autograd, to which s is a
    function of x, has (x / v)^2: the other sign, and it says so."""
    v = 0.5
    x = torch.special.ndtri((torch.arange(2000).double() + 0.5) / 2000)[:, None] * v**0.5
    at = Known(x, score=lambda x: -x / v)
    found = function("fisher").first_variation(at)(NEW[:, :1])
    torch.testing.assert_close(found, (NEW[:, 0] / v) ** 2)
    # d/dv of 1 / v, and of the mean of both functions under N(0, v), whose second moment is v
    assert -1 / v**2 == pytest.approx(-((1 / v) ** 2) * 1.0)
    assert "whose own change with the law is not in its first variation" in function("fisher").caveats(1.0)[1]
    assert function("fisher").needs == ("score",)


@pytest.mark.parametrize("name", ["risk", pytest.param("risk_of_samples", marks=pytest.mark.slow)])
def test_the_error_is_the_spread_of_the_estimate(name: str) -> None:
    """By the delta method, and by a jackknife over 20 groups, which knows the error to a sixth each time."""
    found = [function(name).value(known(200, seed)) for seed in range(100)]
    spread = np.std([each.value for each in found])
    assert math.sqrt(np.mean([each.standard_error**2 for each in found])) / spread == pytest.approx(1, abs=0.25)


def test_the_mean_without_weights() -> None:
    """Its sensitivity curve is x - mean; its error by leaving out one of 20 samples that of a textbook, std / sqrt(20).
    An argument of its own with a default stays as it is, and a score is not told where none is asked for."""

    def mean(x: Tensor, factor: float = 3.0) -> Tensor:
        return factor * x.mean()

    x = torch.randn(20, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    at = Known(x, score=lambda x: -x)
    found = of_law(mean).value(at)
    assert found.value == pytest.approx(3 * float(x.mean()))
    assert found.standard_error == pytest.approx(3 * float(x.std()) / 20**0.5)
    torch.testing.assert_close(of_law(mean).first_variation(at)(NEW[:, :1]), 3 * (NEW[:, 0] - x.mean()))


def test_what_cannot_be_a_utility() -> None:
    at = known(10)
    cases: list[tuple[Any, str]] = [
        (lambda x, prompts: x.sum(), "has the argument 'prompts'; beside the samples it can have weights, rewards, scores"),
        (lambda x: x[:, 0], r"must return one number, a float tensor \[\], got \[10\]"),
        (lambda x: 1.0, "got float"),
        (lambda x, weights: x.mean(), "does not use its `weights`"),
    ]
    for wrong, message in cases:
        with pytest.raises(InputError, match=message):
            of_law(wrong).value(at)
    with pytest.raises(InputError, match="has no argument `weights`, and the samples have some"):
        of_law(spread).value(replace(at, weights=torch.arange(10.0)))
    with pytest.raises(UserCodeError, match=r"utility test_utility_function:broken raised ValueError: no"):
        function("broken").value(at)
    with pytest.raises(InputError, match="has no 'spraed', did you mean 'spread'"):
        function("spraed").value(at)
    with pytest.raises(InputError, match="utility function needs a reward for 'reward'"):
        function("risk").value(Known(at.x))


def test_a_function_of_a_variance_is_the_mean_variance() -> None:
    """A second utility, without weights: E r - Var r."""

    def ours(x: Tensor, rewards: Tensor) -> Tensor:
        return rewards.mean() - rewards.var()

    at = known(400)
    found = value_and_gradient(of_law(ours).first_variation(at), NEW)[1]
    expected = value_and_gradient(MeanVariance().first_variation(at), NEW)[1]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)
