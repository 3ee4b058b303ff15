"""The checks of one's own parts: every built-in passes them, and what is planted is found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiltflow
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import Coefficients, Cosine, DiscreteVariancePreserving, Linear, VariancePreserving
from tiltflow.laws.target import Target
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.plugins import names
from tiltflow.rewards.ink import Ink
from tiltflow.rewards.stroke_thickness import StrokeThickness
from tiltflow.samplers.grid import Start
from tiltflow.samplers.solver import SOLVERS, OdeSolver, solver_named
from tiltflow.samplers.solvers.memoryless import Memoryless
from tiltflow.testing import check_interpolant, check_method, check_model, check_reward, check_solver
from tiltflow.testing.gaussian import Shifted


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", names(SOLVERS))
def test_every_solver(name: str, eta: float) -> None:
    check_solver(solver_named(name, eta))


class Lagging(OdeSolver):
    """Euler's method, which says that its order is 2."""

    order = 2

    def states(self, velocity: Any, x: Tensor, times: Tensor) -> list[Tensor]:
        states = [x]
        for t, h in zip(times, times.diff(), strict=False):
            states.append(states[-1] + h * velocity(states[-1], t))
        return states


class Loud(Memoryless):
    has_noise = False


class Remembering(Memoryless):
    is_memoryless = False


@pytest.mark.parametrize(
    ("solver", "said"),
    [
        (Lagging(), r"says that its order is 2, and its error falls as h\^0\.99: 0\.019 at 40 steps, 0\.0098 at 80"),
        (Loud(), "claims has_noise = False, but its steps say True"),
        (Remembering(), "says is_memoryless = False, and 0"),
    ],
)
def test_a_solver_that_is_not_what_it_says(solver: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_solver(solver)


@pytest.mark.parametrize("interpolant", [Linear(), Cosine(), VariancePreserving(), DiscreteVariancePreserving()])
def test_every_interpolant(interpolant: Any) -> None:
    check_interpolant(interpolant)


class WrongSlope(Cosine):
    def __call__(self, s: Tensor) -> Coefficients:
        c = super().__call__(s)
        return Coefficients(c.alpha, c.beta, c.d_alpha, -c.d_beta)


def test_an_interpolant_whose_derivative_is_not_its_own() -> None:
    with pytest.raises(AssertionError, match="d_beta is not the derivative of beta"):
        check_interpolant(WrongSlope())  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [Ink(), StrokeThickness()])
def test_rewards_of_images(settings: Any) -> None:
    check_reward(settings.build(), tiltflow.load("digits-flow").sample(6, sampling=tiltflow.Sampling(num_inference_steps=4)))


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda x: x.sum(1) - x.mean(), "the reward of a sample changes by up to .* alone"),
        (lambda x: x[:, 0] + torch.randn(len(x)), "different values for the same samples"),
        (lambda x: x[:, 0] * x[:, 0].detach(), "slope of the reward is off by"),
        (lambda x: (x[:, 0] > 0).float() + 0 * x[:, 0], "zero everywhere"),
    ],
)
def test_a_reward_that_is_no_function_of_a_sample(reward: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_reward(reward, torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))


def test_models() -> None:
    check_model(tiltflow.Model(Flow(Shifted(0.5)), (1,), tiltflow.Sampling(solver="heun", num_inference_steps=20)))
    check_model(tiltflow.load("digits-flow"))


class Crowd(nn.Module):
    """The mean of the batch is in each velocity."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x.mean(0).expand_as(x)


def test_a_model_whose_samples_look_at_each_other() -> None:
    with pytest.raises(AssertionError, match=r"the velocity of a sample changes by up to .* when it is evaluated alone"):
        check_model(tiltflow.Model(Flow(Crowd()), (1,)))


METHODS = {
    "adjoint matching": AdjointMatching(beta=0.5, num_inference_steps=20),
    "adjoint matching, bootstrap": AdjointMatching(beta=0.5, num_inference_steps=20, bootstrap=0.5),
    "score as action": ScoreAsAction(beta=0.5, num_inference_steps=20),
    "reward-weighted": OrwCfmW2(tau=0.5, alpha=0.5, weight_mode="both-terms", num_inference_steps=10),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leads_to_its_law(name: str) -> None:
    check_method(METHODS[name])


class Doubled(AdjointMatching):
    """Says that it aims at a tilt three times as strong as its own."""

    def target(self, steps: int, start: Start = 0.0) -> Target:
        own = super().target(steps, start)
        return replace(own, log_tilt=lambda rewards: 3 * own.log_tilt(rewards))


class Offset(AdjointMatching):
    """A log density up to a constant."""

    def target(self, steps: int, start: Start = 0.0) -> Target:
        own = super().target(steps, start)
        return replace(own, log_tilt=lambda rewards: 7 + own.log_tilt(rewards))


def test_the_constant_of_a_log_tilt_does_not_matter() -> None:
    check_method(Offset(beta=0.5, num_inference_steps=20))


def test_a_method_that_aims_elsewhere() -> None:
    with pytest.raises(AssertionError, match="which does not lead there"):
        check_method(Doubled(beta=0.5, num_inference_steps=20))
