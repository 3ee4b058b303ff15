"""`tiltflow verify utility`: the law that is best for each utility is known twice, and reached."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError
from tiltflow.evaluation.distances import sliced_w2
from tiltflow.flows.flow import Flow
from tiltflow.laws import functionals
from tiltflow.laws.gaussian_mixture import ExactVelocity, GaussianMixture
from tiltflow.laws.utility_optimum import kl, tilted
from tiltflow.plugins import names
from tiltflow.problems import Trained
from tiltflow.problems.utility import SUITED
from tiltflow.problems.verification.best_law import Best, functional
from tiltflow.problems.verification.verify import Verification, read_verification
from tiltflow.runs.staged.verification import Onward, steps, verify
from tiltflow.streams import stream
from tiltflow.training.trainer import Record
from tiltflow.utilities.estimation.known import Known


def posed(name: str, *overrides: str, method: str | None = None) -> Verification:
    return read_verification("utility", method, [f"utility.name={name}", *overrides])


def best_of(name: str, *overrides: str) -> tuple[Any, Best]:
    settings = posed(name, *overrides)
    found = settings.problem.exact_law(settings.method, 1)
    assert isinstance(found, Best)
    return settings.problem, found


def test_every_utility_has_settings_that_suit_it() -> None:
    assert set(SUITED) == set(names("utilities"))


# ---- the best law, a second time ----

EXACT = sorted(set(SUITED) - {"spread-conditions"})


@pytest.mark.parametrize("name", EXACT)
def test_the_best_law_is_stationary_and_better_than_its_neighbours(name: str) -> None:
    """log p / q = dF / alpha up to a constant, and F - alpha KL falls to all sides. An augmented Lagrangian is taken at the
    multiplier at which it settles."""
    problem, best = best_of(name)
    (q,), (p,) = best.points.base, best.masses
    own = functional(best.utility, best.points, alone=True)
    # the thresholds of tails are at points in closed form, and between them here
    assert functionals.misfit(p, q, own.slope(p), problem.alpha) < (2e-3 if name in ("cvar", "superquantile") else 1e-6)
    x, value = best.points.grid.axes[0], own.value(p) - problem.alpha * kl(p, q)
    assert own.value(p) == best.value
    assert kl(p, q) == best.kl
    for bump in (np.sin(x), np.cos(2 * x), x, -x, -np.sin(x)):
        near = tilted(p, 0.05 * bump)
        assert own.value(near) - problem.alpha * kl(near, q) < value - 1e-6


KNOWN = sorted(set(EXACT) - {"entropy", "sum", "wasserstein-1", "wasserstein-2"})


@pytest.mark.parametrize("name", KNOWN)
def test_the_best_law_is_stationary_for_the_first_variation_that_stages_take(name: str) -> None:
    """The utility itself, of points with the probabilities of the best law as weights, knows the same slope."""
    problem, best = best_of(name)
    (q,), (p,) = best.points.base, best.masses
    levels = (np.arange(300) + 0.5) / 300
    reference = np.interp(levels, np.cumsum(q) - q / 2, best.points.grid.axes[0])
    some = p > 1e-12
    x = torch.from_numpy(best.points.grid.points[some])

    def log_ratio(at: Tensor) -> Tensor:
        assert len(at) == some.sum()
        return torch.from_numpy(np.log(p[some] / q[some]))

    at = Known(
        x,
        torch.from_numpy(p[some]),
        reward=problem.rewards(),
        log_ratio=log_ratio,
        score=torch.zeros_like,
        base_score=torch.zeros_like,
        reference=torch.from_numpy(reference)[:, None],
    )
    slope = best.utility.first_variation(at)(x).numpy()
    found = np.zeros_like(p)
    found[some] = slope
    tolerance = 0.01 if name in ("cvar", "superquantile", "mmd") else 1e-6
    assert functionals.misfit(np.where(some, p, 0) / p[some].sum(), q, found, problem.alpha) < tolerance
    estimate = best.utility.value(at)
    if name != "mmd":  # without the terms of a sample with itself, which is for samples
        assert estimate.value == pytest.approx(best.value, abs=2e-3)


def moments(best: Best, z: int = 0) -> tuple[float, float]:
    x, p = best.points.grid.points[:, 0], best.masses[z]
    m = float(p @ x)
    return m, float(p @ (x - m) ** 2)


@pytest.mark.parametrize(
    ("name", "mean", "variance"),
    [
        ("expected-reward", 1.0, 1.0),  # m = c s^2 / alpha
        ("entropy", 0.0, 1.5),  # s^2 (1 + alpha) / alpha
        ("kl", 0.5, 1.0),  # a tilt at alpha + 1
        ("mean-variance", 0.5, 1 / 1.5),  # m = s^2 / alpha, 1 / v = 1 / s^2 + 2 c / alpha
        ("function", 0.5, 1 / 1.5),  # the same, as a function of samples
        ("augmented-lagrangian", 0.5, 1.0),  # the tilt with the mean cost at its limit
        ("wasserstein-1", 1.0, 1.0),  # 2 - 1
        ("wasserstein-2", 0.5, 1.0),  # 2 / (2 + alpha)
        ("optimal-design", 0.0, 1.49967),  # 1 / v = 1 - 2 / (alpha (v + ridge))
        ("sum", 1.0, 1.5),  # E x + H / 2
    ],
)
def test_normal_best_laws(name: str, mean: float, variance: float) -> None:
    assert moments(best_of(name)[1]) == pytest.approx((mean, variance), abs=2e-5)


def test_a_limit_is_kept_by_the_price_of_the_cost() -> None:
    """At the best law with a barrier b / (C - E c) is the price: E x = 1 - b / (C - E x) on N(0, 1), alpha = 1."""
    m, _ = moments(best_of("log-barrier")[1])
    assert m == pytest.approx(1 - 0.2 / (0.8 - m))
    _, limited = best_of("augmented-lagrangian")
    assert limited.utility.multiplier == pytest.approx(0.5)  # type: ignore[attr-defined]
    _, loose = best_of("augmented-lagrangian", "utility.limit=2.0")
    assert loose.utility.multiplier == 0  # type: ignore[attr-defined]
    assert moments(loose)[0] == pytest.approx(1)
    _, each = best_of("augmented-lagrangian", "utility.samples=true")
    assert moments(each)[0] == pytest.approx(0.5)  # its mean keeps the limit too, by another law
    assert each.kl > limited.kl + 0.01


def test_classes_are_pushed_apart_by_their_log_odds() -> None:
    """p_z of N(-+1/2, 1) tilted by log p_z / p: by symmetry both alike, and each is stationary for its own."""
    problem, best = best_of("spread-conditions")
    (low, _), (high, _) = moments(best, 0), moments(best, 1)
    assert low == pytest.approx(-high)
    assert high > 0.6
    x = best.points.grid.points[:, 0]
    for q, p, sign in zip(best.points.base, best.masses, (-1, 1), strict=True):
        # log p_z / mean of both = log 2 - log(1 + exp(-sign x)): the odds of the classes are exp(x)
        odds = math.log(2) - np.logaddexp(0, -sign * x)
        assert np.abs(p - tilted(q, odds)).sum() < 1e-9
    assert best.value == pytest.approx(
        sum(float(p @ (math.log(2) - np.logaddexp(0, -s * x))) for p, s in zip(best.masses, (-1, 1), strict=True)) / 2
    )
    labels = torch.arange(6) % 2
    at = Known(torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None], log_odds=problem.log_odds, labels=labels)
    expected = math.log(2) - np.logaddexp(0, -(2 * labels.numpy() - 1) * at.x[:, 0].numpy())
    assert best.utility.value(at).value == pytest.approx(expected.mean())


def test_mixtures_and_the_plane() -> None:
    """A linear reward on a mixture of two in the plane: the tilt of the closed form."""
    overrides = ["dimension=2", "means=[[-1, 0], [1, 0.5]]", "scale=[0.8, 0.6]", "linear=[0.7, -0.4]", "weights=[1, 2]"]
    problem, best = best_of("expected-reward", *overrides)
    exact = problem.base().tilt(problem.reward(), 1.0)
    assert best.value == pytest.approx(exact.expectation(problem.reward()), rel=1e-6)
    assert best.kl == pytest.approx(best.value - problem.base().log_partition(problem.reward(), 1.0), rel=1e-6)
    drawn, own = best.sample(20_000, stream(0, "a")), exact.sample(20_000, stream(0, "b"))
    again = exact.sample(20_000, stream(0, "c"))
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    assert sliced_w2(drawn, own, directions) < 2 * sliced_w2(again, own, directions) + 0.01


def test_samples_of_classes_come_in_turn() -> None:
    _, best = best_of("spread-conditions")
    x = best.sample(4001, stream(0, "a"))[:, 0]
    for z in (0, 1):
        m, v = moments(best, z)
        own = x[z::2]
        assert abs(float(own.mean()) - m) < 4 * math.sqrt(v / len(own))
        assert float(own.var()) == pytest.approx(v, rel=0.15)


# ---- bad input ----


@pytest.mark.parametrize(
    ("name", "overrides", "method", "message"),
    [
        ("cvar", ["utility.share=1.5"], None, r"utility\.share must be less than 1"),
        ("superquantil", [], None, "no utility 'superquantil', did you mean 'superquantile'"),
        ("superquantile", ["utility.share=1e-4"], None, "the tail with share 0.0001 of 4000 samples has less than one"),
        ("log-barrier", ["utility.limit=-0.2"], None, "the mean cost of the base is .*, beyond the limit -0.2"),
        ("mean-variance", ["alpha=0"], None, "alpha must be above 0: without a price"),
        ("entropic-risk", ["utility.risk=4", "alpha=0.01"], None, "the best law leaves the grid"),
        ("superquantile", ["beta=0.3"], None, "the temperature of a stage is alpha"),
        ("entropy", [], "tilt-matching", "known by its gradient alone, and tilt-matching learns from values"),
        ("superquantile", [], "orw-cfm-w2", "orw-cfm-w2 has no temperature"),
        ("wasserstein-2", ["dimension=2"], None, "the best law of wasserstein-2 is not known in the plane"),
        ("mmd", ["utility.bandwidth=null"], None, "the best law of mmd is not known without a bandwidth"),
        ("spread-conditions", ["means=[[0]]"], None, "spread-conditions needs two modes or more"),
        ("cvar", ["means=[[0, 1]]"], None, "a mean has more numbers than dimension 1"),
        ("cvar", ["linear=[0, 1]"], None, "linear has 2 numbers, dimension is 1"),
        ("cvar", ["scale=[1, 2]"], None, "scale has 2 numbers for 1 modes"),
        ("cvar", ["utility.shar=0.1"], None, "shar"),
        ("function", ["utility.path=math:sqrt"], None, "math:sqrt"),
    ],
)
def test_what_is_wrong_is_one_line_before_training(name: str, overrides: list[str], method: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        verify(posed(name, "law_samples=4000", *overrides, method=method), watch=never)
    assert "\n" not in str(error.value)


def test_a_utility_of_another_problem_is_refused() -> None:
    done = CliRunner().invoke(app, ["verify", "mixture", "--utility", "kl"])
    assert isinstance(done.exception, InputError) or done.exit_code == 2
    assert "--utility belongs to the problem utility" in " ".join(f"{done.output} {done.exception}".split())


def never(record: Record) -> None:
    raise AssertionError("it trains")


# ---- what is reported ----

SMALL = ["iterations=2", "train_batch_size=8", "num_samples=200", "law_samples=100", "draws=2", "hidden=8", "layers=1"]


def test_an_entropy_without_a_price_stops_after_its_stages_and_says_so() -> None:
    found = verify(posed("entropy", "alpha=0", "stages=1", *SMALL))
    assert found.values["distance"] is None
    assert found.values["stage_base"] == "last"
    assert "has no optimum" in found.values["caveats"][0]
    assert "has no optimum" in str(found.tables[0].rows["caveat"])


def test_records_go_on_from_stage_to_stage() -> None:
    seen: list[Record] = []
    watch = Onward(seen.append)
    for stage in (1, 2):
        for step in (1, 2, 3):
            watch(Record(step, {}, seconds=stage * step, network_evaluations=10 * step, samples_drawn=step))
    assert [record.step for record in seen] == [1, 2, 3, 4, 5, 6]
    assert [record.seconds for record in seen] == [1, 2, 3, 5, 7, 9]
    assert seen[-1].network_evaluations == 60
    assert steps(posed("cvar", "stages=3", "iterations=7")) == 21
    assert steps(read_verification("mixture", None, ["iterations=7"])) == 7


def checked(name: str, mean: float, variance: float) -> dict[str, Any]:
    """What is found of a model that is N(mean, variance)."""
    settings = posed(name, "law_samples=1000")
    problem, method = settings.problem, settings.method
    law = GaussianMixture(torch.zeros(1).double(), torch.tensor([[mean]]).double(), torch.tensor([variance]).double())
    record = Record(1, {}, seconds=1.0, network_evaluations=1)
    best = problem.exact_law(method, 1)
    flow = Flow(ExactVelocity(law))
    return problem.check(Trained(method, flow, problem.base_flow(), best, record, 1, 1, 1000, 5, seed=0)).values


@pytest.mark.parametrize(("name", "mean", "variance"), [("kl", 0.5, 1.0), ("sum", 1.0, 1.5)])
def test_a_model_that_has_the_best_law_is_at_the_floor(name: str, mean: float, variance: float) -> None:
    values = checked(name, mean, variance)
    assert values["distance"] < 1.7 * values["floor"] < 0.5 * values["distance_base"]
    for key in ("utility", "kl"):
        found = values["utility_value" if key == "utility" else "kl"]
        assert abs(found - values[f"{key}_exact"]) < 4 * values[f"{key}_error"] + 0.005  # of the ODE


def test_a_barrier_that_is_crossed_has_no_value_and_says_so() -> None:
    values = checked("log-barrier", 2.0, 1.0)
    assert values["utility_value"] is None
    assert "log-barrier" in values["caveats"][-1]
    assert values["distance"] > 1


def test_the_command_prints_what_is_exact() -> None:
    small = [part for one in (*SMALL, "stages=2") for part in ("--set", one)]
    done = CliRunner().invoke(app, ["verify", "utility", "--utility", "wasserstein-1", "--json", *small])
    assert done.exit_code == 0, done.output
    values, words = json.loads(done.stdout.splitlines()[-1]), " ".join(done.output.split())
    assert (values["problem"], values["utility"]["name"], values["iterations"]) == ("utility", "sum", 2)
    assert values["utility_exact"] == pytest.approx(1.0, abs=1e-5)  # 2 m - |m| at m = 1
    assert values["kl_exact"] == pytest.approx(0.5, abs=1e-5)
    assert values["distance_base"] == pytest.approx(1.0, abs=0.25)
    assert values["ratio"] == values["distance"] / values["floor"]
    assert "stages 2, each from the first model" in words
    assert "a reward is added the best law of wasserstein-1 alone is the base" in words


@pytest.mark.slow
def test_what_is_reported_of_the_base_is_that_of_the_base() -> None:
    """A step that changes nothing: no KL, and the utility of N(0, 1)."""
    sizes = ["law_samples=2000", "num_samples=2000"]
    values = verify(posed("mean-variance", *SMALL, *sizes, "stages=1", "learning_rate=1e-12")).values
    assert abs(values["kl"]) < 1e-3
    assert abs(values["utility_value"] + 0.5) < 4 * values["utility_error"]
    assert values["distance"] == pytest.approx(values["distance_base"], rel=1e-2)


# ---- reached ----


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SUITED))
def test_every_utility_is_reached_within_twice_the_floor(name: str) -> None:
    values = verify(posed(name)).values
    assert values["distance"] <= 2 * values["floor"]
    assert values["distance_base"] > 3 * values["floor"]
    assert abs(values["kl"] - values["kl_exact"]) < 5 * values["kl_error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "overrides"),
    [
        ("superquantile", "tilt-matching", []),
        ("entropy", None, ["stage_base=last", "stages=5"]),
        ("optimal-design", None, ["dimension=2"]),
    ],
)
def test_other_methods_ways_and_dimensions_reach_it_too(name: str, method: str | None, overrides: list[str]) -> None:
    values = verify(posed(name, *overrides, method=method)).values
    assert values["distance"] <= 2 * values["floor"]
