"""The KL budget: where its feedback settles, in closed form, with noise, and with a model that follows slowly."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lines import TWO_MODES

import tiltflow
from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import GaussianMixture, QuadraticReward, mixture
from tiltflow.laws.tilted_law import temperature_of_kl, tilted
from tiltflow.testing.gaussian import Shifted
from tiltflow.training.kl_budget import DEAD_BAND, GRID, LIMIT, MOST, KlBudget, changed
from tiltflow.training.method import Method
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.trainer import train

STANDARD = mixture(torch.tensor([[0.7]], dtype=torch.float64), (1.0,), 0.5)
CURVED = QuadraticReward(torch.tensor([1.7], dtype=torch.float64), 3.0)
STEPS = 320


def standard_kl(beta: float) -> float:
    """KL(N(0.7, 0.25) exp((1.7 x - 1.5 x^2) / beta) | N(0.7, 0.25)), in closed form."""
    target: GaussianMixture = STANDARD.tilt(CURVED, beta)
    return target.expectation(CURVED) / beta - STANDARD.log_partition(CURVED, beta)


def two_modes_kl(beta: float) -> float:
    return tilted(TWO_MODES, np.tanh, beta).kl(TWO_MODES)


def simulated(
    budget: KlBudget,
    kl: Callable[[float], float],
    *,
    deviation: float,
    lag: float = 1.0,
    noise: float = 0.0,
    passes: int = 1,
    seed: int = 0,
) -> list[float]:
    """The temperatures of a run whose model goes, in each batch, the 1 / lag-th part of the way to the inverse temperature that
    the method works at, and whose measured KL has relative noise."""
    generator, eta, betas = torch.Generator().manual_seed(seed), 0.0, []
    for step in range(passes, budget.steps + 1, passes):
        betas.append(budget.working_beta)
        eta += (1 / budget.working_beta - eta) / lag
        seen = kl(1 / eta) * math.exp(noise * torch.randn((), generator=generator).item() - noise**2 / 2)
        budget.update({"path_kl": seen, "reward_std": deviation}, step)
    return betas


def test_the_kl_of_the_tilted_law_is_the_one_that_is_known() -> None:
    for budget, beta in ((0.01, 3.489973), (0.05, 1.292389), (0.1, 0.781882), (0.5, 0.151660)):
        assert standard_kl(beta) == pytest.approx(budget, rel=1e-4)
    for budget, beta in ((0.01, 6.137367), (0.05, 2.690226), (0.1, 1.852511), (0.5, 0.603303)):
        assert two_modes_kl(beta) == pytest.approx(budget, rel=1e-4)


@pytest.mark.parametrize(("rate", "first", "rounds"), [(0.2, -0.2120, 10), (0.5, -0.1014, 3), (0.8, 0.0209, 2)])
def test_rounds_of_feedback_settle_as_fast_as_their_rate_says(rate: float, first: float, rounds: int) -> None:
    """From beta = 1 to a KL of 0.1, up to the dead band, where that of a perfect model is measured without noise."""
    log_eta, errors = 0.0, []
    for _ in range(rounds):
        log_eta += changed(standard_kl(math.exp(-log_eta)), 0.1, rate)
        errors.append(standard_kl(math.exp(-log_eta)) / 0.1 - 1)
    assert errors[0] == pytest.approx(first, abs=1e-4)
    assert abs(errors[-1]) < DEAD_BAND
    assert all(abs(error) > DEAD_BAND for error in errors[:-1])


def test_a_change_is_in_proportion_to_the_logarithm_and_limited() -> None:
    assert changed(0.4, 0.5) == pytest.approx(0.5 * math.log(0.5 / 0.4))
    assert changed(0.4, 0.5, 0.3) == pytest.approx(0.3 * math.log(0.5 / 0.4))
    assert changed(0.5 * math.exp(1.01 * DEAD_BAND), 0.5) < 0
    for within in (1.0, 0.99, -0.99):
        assert changed(0.5 * math.exp(within * DEAD_BAND * 0.999), 0.5) == 0
    assert changed(1e-9, 0.5) == changed(0.0, 0.5) == MOST
    assert changed(1e9, 0.5) == -MOST


@pytest.mark.parametrize("wrong", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("lag", [1, 20, 40])
@pytest.mark.parametrize(("kl", "budget", "exact"), [(standard_kl, 0.1, 0.781882), (two_modes_kl, 0.5, 0.603303)])
def test_a_run_ends_at_the_temperature_of_its_budget(
    kl: Callable[[float], float], budget: float, exact: float, lag: int, wrong: float
) -> None:
    """Whatever the method's beta, from rewards whose deviation misleads by a factor of 3 either way, and with a model that
    takes an eighth of the run to follow."""
    found = KlBudget(budget, 50.0, STEPS)
    betas = simulated(found, kl, deviation=wrong * exact * (2 * budget) ** 0.5, lag=lag)
    assert betas[0] == pytest.approx(50)
    assert betas[1] == pytest.approx(wrong * exact, rel=1e-5)
    assert abs(math.log(kl(found.working_beta) / budget)) < {1: 0.02, 20: 0.04, 40: 0.18}[lag]
    assert betas[-1] == found.working_beta
    assert set(betas[3 * STEPS // 4 :]) == {betas[-1]}  # the last quarter
    assert not found.at_limit


def test_noise_of_the_batches_is_averaged() -> None:
    """A third of the KL in each batch is a few percent in that of the last quarter's temperature, by the mean over a quarter of
    the run; more without it."""
    errors = []
    for seed in range(40):
        found = KlBudget(0.1, 1.0, STEPS)
        betas = simulated(found, lambda beta: 0.5 / beta**2, deviation=0.7, noise=1 / 3, seed=seed)
        errors.append([math.log(5 / beta**2) for beta in (betas[-1], betas[3 * STEPS // 4 - 1])])
    last, before = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert last < 0.08
    assert before > 1.25 * last


def test_the_tilt_is_not_raised_before_a_quarter_and_lowered_at_any_time() -> None:
    for kl, sign in ((0.001, 1), (10.0, -1)):
        found = KlBudget(0.5, 1.0, STEPS)
        betas = simulated(found, lambda beta, kl=kl: kl, deviation=1.0)  # type: ignore[misc]
        first = next(i for i, beta in enumerate(betas[1:], 1) if beta != betas[1])
        assert first == (5 * STEPS // 16 if sign > 0 else STEPS // 16)
        assert math.copysign(1, betas[1] - betas[first]) == sign
        assert betas[first] / betas[1] == pytest.approx(2.0**-sign, rel=1e-5)


def test_a_budget_that_cannot_be_spent_ends_at_the_limit() -> None:
    found = KlBudget(0.5, 2.0, STEPS)
    betas = simulated(found, lambda beta: 0.1, deviation=0.0)  # a constant reward has no deviation to start from
    assert betas[1] == pytest.approx(2)
    assert found.working_beta == pytest.approx(2 / LIMIT, rel=0.3)
    assert found.at_limit
    other = KlBudget(0.5, 2.0, STEPS)
    simulated(other, lambda beta: 3.0, deviation=1.0)
    assert other.working_beta == pytest.approx(LIMIT, rel=1e-4)
    assert other.at_limit


@pytest.mark.parametrize("passes", [1, 8, 40, 160])
def test_a_run_of_few_batches_has_fewer_rounds(passes: int) -> None:
    found = KlBudget(0.1, 1.0, STEPS)
    betas = simulated(found, standard_kl, deviation=0.5, passes=passes)
    assert len(betas) == STEPS // passes
    if passes <= 40:
        assert abs(math.log(standard_kl(found.working_beta) / 0.1)) < 0.1


def test_it_resumes_where_it_was() -> None:
    whole, parts = KlBudget(0.1, 1.0, 64), KlBudget(0.1, 1.0, 64)
    for step in range(1, 65):
        measured = {"kl": 0.1 + 0.03 * math.sin(step), "reward_std": 0.4}
        whole.update(measured, step)
        parts.update(measured, step)
        state = parts.state_dict()
        parts = KlBudget(0.1, 1.0, 64)
        parts.load_state_dict(state)
        assert parts.working_beta == whole.working_beta
        assert (whole.log_eta * GRID).is_integer()


METHODS = [
    pytest.param(tiltflow.AdjointMatching(num_inference_steps=10), 160, 0.05, marks=pytest.mark.slow),
    pytest.param(
        tiltflow.OrwCfmW2(tau=0.3, weight_mode="both-terms", num_inference_steps=10, num_passes=4),
        640,
        0.02,
        marks=pytest.mark.slow,
    ),
    (tiltflow.TiltMatching(num_inference_steps=10), 320, 0.02),
]


@pytest.mark.parametrize(("method", "steps", "rate"), METHODS, ids=lambda value: getattr(value, "name", ""))
def test_training_ends_at_the_temperature_of_the_budget(method: Method, steps: int, rate: float) -> None:
    """N(0, 1) under 2 x: the tilt at temperature 2 is N(1, 1), half a nat from the base, whatever the method's own beta."""
    tuned, base = Flow(Shifted()), Flow(Shifted())
    budget = KlBudget(0.5, method.temperature or 0.0, steps)
    records = train(
        tuned,
        base,
        method,
        lambda x: 2 * x[:, 0],
        lambda generator: torch.randn(256, 1, generator=generator),
        max_train_steps=steps,
        optimizer=Optimizer(learning_rate=rate, lr_scheduler="constant"),
        temperature=budget,
    )
    betas = [record.metrics["beta"] for record in records]
    assert betas[0] == pytest.approx(method.temperature)
    assert betas[-1] == betas[-steps // 5] == pytest.approx(2, rel=0.1)
    assert next(tuned.parameters()).item() == pytest.approx(1, abs=0.12)


def test_batches_without_a_kl_change_nothing_and_that_of_a_law_goes_first() -> None:
    """Tilt Matching measures none while it is on its way to the temperature."""
    found = KlBudget(0.5, 1.0, 16)
    for step in range(1, 9):
        found.update({"reward_std": 1.0}, step)
    assert found.working_beta == pytest.approx(1)  # sqrt(2 * 0.5) / 1
    found.update({"path_kl": 0.2, "kl": 0.1, "reward_std": 9.0}, 9)
    assert found.log_eta == pytest.approx(MOST, abs=1e-5)
    found.update({"path_kl": 0.4, "reward_std": 9.0}, 10)
    assert found.log_eta == pytest.approx(MOST + math.log(0.5 / 0.4) / 2, abs=1e-5)
    assert temperature_of_kl(TWO_MODES, np.tanh, 0.5) == pytest.approx(0.603303, abs=1e-4)
