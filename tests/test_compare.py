"""A comparison of methods: one budget for all, one rule of tuning, paired statistics, and a folder that can go on."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats
from tiny import tiny_classifier, tiny_recipe
from torch import Tensor
from typer.testing import CliRunner

import tiltflow
from tiltflow.commands.compare import print_subject
from tiltflow.commands.terminal.app import app
from tiltflow.commands.terminal.progress import jobs_progress
from tiltflow.errors import InputError
from tiltflow.evaluation.paired import all_pairs, difference, holm
from tiltflow.evaluation.samples import Instruments
from tiltflow.files import write_json
from tiltflow.flows.flow import Flow
from tiltflow.formatting import decimal
from tiltflow.laws.gaussian_mixture import ExactVelocity, QuadraticReward
from tiltflow.laws.lqg import chain_optimum
from tiltflow.methods.fbrac import Fbrac
from tiltflow.methods.fql import Fql
from tiltflow.models.protocol import GenerativeModel
from tiltflow.networks.quadratic import chebyshev
from tiltflow.problems.gaussian import Gaussian
from tiltflow.problems.linear_quadratic import Feedback, LinearQuadratic
from tiltflow.problems.verification.verify import Verification
from tiltflow.reports.comparison import write_comparison_report
from tiltflow.rewards.functions.counting import count_rewards
from tiltflow.runs.advice.scoreboard import lines_of, of_methods
from tiltflow.runs.comparison.budget import KINDS, Budget, Cost, Meter
from tiltflow.runs.comparison.compare import ROWS, compare, continues, read_known, trainings, units
from tiltflow.runs.comparison.on_problem import OnProblem, problem_of
from tiltflow.runs.comparison.on_recipe import OnRecipe
from tiltflow.runs.comparison.plan import FACTORS, MOST_SEEDS, SHARE_OF_TUNING, Plan
from tiltflow.runs.comparison.results import best_factor, results
from tiltflow.runs.comparison.subject import Chosen, sampled_by
from tiltflow.runs.comparison.training import Job, work
from tiltflow.runs.recipe import Recipe

SMALL = ("train_batch_size=32", "hidden=8")
SETTINGS = [f"gaussian.{text}" for text in SMALL]
METHODS = ("draft", "flow-grpo")
EVALUATIONS = 9000


def plan_of(methods: tuple[str, ...] = METHODS, **options: Any) -> Plan:
    chosen: dict[str, Any] = {"seeds": 2, "num_samples": 100, "settings": SETTINGS, "budget": Budget(KINDS[0], EVALUATIONS)}
    return Plan.of(methods, ["gaussian"], **(chosen | options))


def unlike(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what differs when a comparison is repeated, in one order."""
    kept = [json.loads(json.dumps(row)) for row in rows]
    for row in kept:
        for each in (row, *row.get("points", [])):
            each.pop("seconds", None)
    return sorted(kept, key=str)


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No report and no pictures, which take longer than such small trainings."""
    monkeypatch.setattr("tiltflow.runs.comparison.compare.write_comparison_report", lambda folder: None)
    monkeypatch.setattr("tiltflow.runs.comparison.on_problem.ProblemTrial._draw", lambda *arguments: None)


def test_progress_says_which_training_of_how_many_and_the_time_that_is_left() -> None:
    """Here two trainings of four are done, one of them earlier, and the third is half way."""
    for terminal in (False, True):
        text = io.StringIO()
        console = Console(file=text, force_terminal=terminal, width=120)
        with jobs_progress(console, False, 3.25, 4) as jobs:
            jobs.ended("a, cost of a step", "5 steps", 0.0)
            jobs.began = time.monotonic() - 4
            jobs.ended("a, seed 0", "already done", 0.25)
            jobs.ended("a, seed 1", "reward 2", 1.0)
            jobs.moved("b, seed 0", 0.5, 1.0)
            (task,) = jobs.bar.tasks
            assert (task.completed, task.total, task.description) == (1.75, 3.25, "3 of 4: b, seed 0")
        said = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue())
        assert ("[2/4] a, seed 1: reward 2  (8.0 s left)" in said) != terminal
        assert ("3 of 4: b, seed 0" in said) == terminal
        assert "[1/4] a, seed 0: already done" in said


# ---- budget ----


@pytest.mark.parametrize("passes", [1, 2, 3, 7])
@pytest.mark.parametrize("once", [0.0, 40.0])
def test_the_cost_of_all_steps_is_known_from_a_few(passes: int, once: float) -> None:
    batch, step = (0.0, 12.0) if passes == 1 else (9.0, 3.0)
    spent = [once + sum(step + (batch if n % passes == 0 else 0) for n in range(k)) for k in range(1, 60)]
    cost = Cost.measured(spent[: max(3, passes + 1)], passes)
    assert [cost.of(k) for k in range(1, 60)] == spent
    for amount in (0.0, spent[0] - 1, spent[0], spent[20] + 1):
        assert cost.steps_within(amount) == sum(each <= amount for each in spent)
    assert [cost.next(k) for k in range(1, 59)] == list(np.diff(spent))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all calls of the reward of `gaussian`, counted by the reward itself."""
    calls: list[int] = []
    plain = Gaussian.reward

    def reward(self: Gaussian) -> Callable[[Tensor], Tensor]:
        of_problem = plain(self)

        def call(x: Tensor) -> Tensor:
            calls.append(len(x))
            return of_problem(x)

        return call

    monkeypatch.setattr(Gaussian, "reward", reward)
    return calls


def job_of(method: str, budget: Budget, purpose: str = "tuning", **options: Any) -> Job:
    subject = OnProblem("gaussian", SMALL, num_samples=100)
    chosen = Chosen(method, options.pop("settings", ()))
    cost = Cost(**work(Job("cost", subject, chosen, budget, Path()))["cost"])
    return Job(purpose, subject, chosen, budget, Path(), cost=cost)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("draft", ()), ("dpok", ()), ("adjoint-matching", ("method.num_inference_steps=5",)), ("endpoint-adjoint-matching", ())],
)
def test_a_training_ends_within_its_budget_and_one_more_step_would_not(
    method: str, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget("network_evaluations", 12_345)
    job = job_of(method, budget, settings=settings)
    calls = counted(monkeypatch)
    monkeypatch.setattr("tiltflow.runs.comparison.on_problem.ProblemTrial.measure", lambda self, keep, whole: {"reward": 0.0})
    row = work(job)
    assert job.cost is not None
    assert row["steps"] == row["steps_planned"]  # all steps cost the same, so that the schedule ends where training does
    assert row["network_evaluations"] <= budget.amount < row["network_evaluations"] + job.cost.next(row["steps"])
    assert row["reward_evaluations"] == sum(calls) > 0


def test_a_budget_of_reward_evaluations_or_of_seconds() -> None:
    row = work(job_of("draft", Budget("reward_evaluations", 170)))
    assert (row["steps"], row["reward_evaluations"]) == (5, 160)  # 32 each
    row = work(job_of("draft", Budget("seconds", 0.3)))
    assert row["steps"] >= 1
    assert row["seconds"] < 0.3 + 0.1


def test_measurements_on_the_way_are_of_the_same_run_and_not_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points at a quarter and at half of the budget, each the last batch within it; what is measured there is what a run of
    as many steps with the same schedule has then."""
    monkeypatch.setattr("tiltflow.runs.comparison.on_problem.ProblemTrial._draw", lambda *arguments: None)
    job = job_of("draft", Budget("network_evaluations", 20_000), "run")
    row, without = work(job), work(job_of("draft", Budget("network_evaluations", 20_000)))
    assert [point["share"] for point in row["points"]] == [0.25, 0.5, 1.0]
    assert job.cost is not None
    for point in row["points"]:
        amount = point["share"] * 20_000
        assert point["network_evaluations"] <= amount < point["network_evaluations"] + job.cost.step
    for key in ("network_evaluations", "reward_evaluations", "steps"):
        assert row[key] == without[key]
    assert row["points"][-1]["reward"] == without["points"][-1]["reward"]  # to look at it changes nothing
    assert len({point["reward"] for point in row["points"]}) == 3


def test_the_clock_stands_still_while_a_model_is_measured() -> None:
    with Meter() as meter:
        with meter.paused():
            time.sleep(0.2)
            count_rewards(5)
        count_rewards(3)
        assert meter.spent.reward_evaluations == 3
        assert meter.spent.seconds < 0.1


# ---- what is measured ----


def test_the_exact_law_is_at_its_floor_and_has_all_of_the_tilt() -> None:
    subject = OnProblem("gaussian", ("quadratic=1",), beta=0.5, num_samples=4000)
    trial = subject.trial(Chosen("deterministic-adjoint-matching"), "cpu")
    before, problem = trial.measure(None, whole=True), cast(Gaussian, trial.problem)
    law = problem.base().tilt(problem.reward(), 0.5)
    trial.tuned = Flow(ExactVelocity(law))
    trial.problem = problem.model_copy(update={"sampling": problem.sampling.model_copy(update={"solver": "heun"})})
    found = trial.measure(None, whole=True)
    assert found["distance"] < 2.5 * found["floor"] < before["distance"] / 5
    assert abs(found["achieved_tilt"] - 1) < 3 * found["achieved_tilt_error"] + 0.02
    assert abs(found["reward"] - law.expectation(problem.reward())) < 4 * found["reward_error"] + 0.02
    assert before["distance"] == pytest.approx(before["distance_base"], rel=0.05)
    assert before["achieved_tilt"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("cost", [0, 2])
def test_the_best_control_of_a_chain_is_at_its_floor(cost: float) -> None:
    """Of five steps, which polynomials of degree four meet; the law of its last state is Gaussian and known, with a running
    reward too, and it is not the base tilted by the reward."""
    sets = ("N=5", "T=1", "dimension=2", f"state_cost={cost}")
    trial = OnProblem("lqg", sets, beta=0.4).trial(Chosen("score-as-action"), "cpu")
    problem: Any = trial.problem
    before, best = trial.measure(None, whole=True), chain_optimum(problem, 0.4, 5)
    controls = torch.tensor(np.array([best.policy(n) for n in range(5)]).T)
    with torch.no_grad():
        (coefficients,) = trial.tuned.parameters()
        coefficients.copy_(torch.linalg.solve(chebyshev(torch.arange(5, dtype=torch.float64) / 5, 4).T, controls.T).T)
    found = trial.measure(None, whole=True)
    assert found["distance"] < 1.6 * found["floor"] < before["distance"] / 5
    assert before["distance"] == pytest.approx(before["distance_base"], rel=0.1)
    exact = 2 * (problem.q * best.mean - problem.Q * (best.mean**2 + best.variance) / 2)
    assert abs(found["reward"] - exact) < 4 * found["reward_error"]
    assert found["achieved_tilt"] is None
    mean, variance = problem.tilted(0.4)
    assert ((best.mean - mean) ** 2 + (best.variance**0.5 - variance**0.5) ** 2) ** 0.5 > 2 * found["floor"]


def test_a_method_that_makes_a_sampler_of_one_step_is_sampled_in_one() -> None:
    assert sampled_by(Fql())["num_inference_steps"] == 1
    assert sampled_by(Fbrac()) == {"solver": "euler", "eta": 1.0}


def test_a_problem_without_a_law_is_refused() -> None:
    with pytest.raises(InputError, match="problem 'own' has no law of its own that all methods can be measured by"):
        problem_of(Verification.model_construct(problem=cast(Any, SimpleNamespace(name="own"))))


def test_the_exact_policy_is_at_the_floor_of_each_observation() -> None:
    """Behaviour exp(Q / beta) of a regulator is Gaussian, with a mean that is linear in the state: another feedback."""
    subject = OnProblem("linear-quadratic", beta=0.5, num_samples=6001)
    trial = subject.trial(Chosen("deterministic-adjoint-matching"), "cpu")
    before = trial.measure(None, whole=True)
    problem = cast(LinearQuadratic, trial.problem)
    trial.problem = problem.model_copy(update={"sampling": problem.sampling.model_copy(update={"solver": "heun"})})
    precision = 1 / problem.scale**2 + problem.reward().curvature / 0.5
    gain = (problem.feedback / problem.scale**2 - problem.reward().slope / 0.5) / precision
    trial.tuned = Flow(Feedback(gain, precision**-0.5))
    found = trial.measure(None, whole=True)
    assert found["distance"] < 1.5 * found["floor"] < before["distance"] / 5
    assert before["distance"] == pytest.approx(before["distance_base"], rel=0.05)
    assert abs(found["achieved_tilt"] - 1) < 3 * found["achieved_tilt_error"] + 0.02
    assert before["achieved_tilt"] == pytest.approx(0, abs=1e-6)
    mean, variance = -gain * torch.tensor(problem.observations), 1 / precision
    value, states = problem.reward(), torch.tensor(problem.observations)
    exact = (value.slope * states * mean - value.curvature / 2 * (mean**2 + variance)).mean()
    assert abs(found["reward"] - exact) < 4 * found["reward_error"] + 0.01
    trial.tuned = Flow(Feedback(-gain, precision**-0.5))  # the policies of other states: as a whole, their actions are as many
    assert trial.measure(None, whole=False)["distance"] > before["distance"]


def test_every_method_with_a_temperature_works_at_that_of_the_comparison() -> None:
    subject = OnProblem("gaussian", SMALL, beta=0.25)
    for method in ("adjoint-matching", "score-as-action", "dpok", "tilt-matching"):
        assert subject.read(Chosen(method)).method.temperature == pytest.approx(0.25), method
    assert subject.read(Chosen("draft")).method.temperature is None
    one, three = (subject.read(Chosen("draft", factor=factor)).optimizer.learning_rate for factor in (1.0, 3.0))
    assert three == pytest.approx(3 * one)


# ---- tuning ----


def tried(factor: float, distance: float | None, reward: float, stopped: str | None = None) -> dict[str, Any]:
    points = [] if stopped else [{"share": 1.0, "distance": distance, "reward": reward}]
    head = {"purpose": "tuning", "subject": "s", "method": "m", "seed": MOST_SEEDS, "factor": factor}
    return head | {"points": points, "stopped": stopped}


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([(1 / 3, 0.2, 9.0), (1.0, 0.1, 1.0), (3.0, 0.3, 5.0)], 1.0),  # the nearest, whatever its reward
        ([(1 / 3, None, 9.0), (1.0, 0.1, 1.0), (3.0, 0.3, 5.0)], 1 / 3),  # one distance is not known: the reward
        ([(1 / 3, 0.2, 0.0), (1.0, 0.2, 0.0), (3.0, 0.2, 0.0)], 1.0),
        ([(1 / 3, 0.2, 0.0), (1.0, 0.0, 0.0, "not finite"), (3.0, 0.1, 0.0)], 3.0),
        ([(1 / 3, 0.2, 0.0, "x"), (1.0, 0.0, 0.0, "x"), (3.0, 0.1, 0.0, "x")], 1.0),
        ([], 1.0),
    ],
)
def test_tuning_takes_the_nearest_or_the_best(rows: list[Any], best: float) -> None:
    others = [tried(3.0, 0.0, 100.0) | {key: "other"} for key in ("method", "subject", "purpose")]
    assert best_factor([tried(*row) for row in rows] + others, "s", "m") == best


# ---- statistics ----


def test_a_difference_is_the_paired_t_test() -> None:
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 7)) + np.array([[0.3], [0.0]])
    found, known = difference(list(first), list(second)), stats.ttest_rel(first, second)
    interval = known.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(first - second))
    assert [found.low, found.high, found.p] == pytest.approx([interval.low, interval.high, known.pvalue])
    assert found.n == 7
    alone = difference([1.0], [0.5])
    assert (alone.mean, alone.low, alone.p) == (0.5, None, None)
    with pytest.raises(ValueError, match="a seed that both have"):
        difference([], [])


def test_holm_is_bonferroni_step_by_step() -> None:
    p = [0.01, 0.02, 0.03, 0.5]
    assert holm(p) == pytest.approx([0.04, 0.06, 0.06, 0.5])
    assert holm(p[::-1]) == pytest.approx([0.04, 0.06, 0.06, 0.5][::-1])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


def test_equal_methods_are_rarely_told_apart() -> None:
    """With four equal methods and five seeds, any of the six pairs is significant in at most 5 % of comparisons, though values
    of a seed depend on each other; of a method that is better by five standard deviations, nearly always."""
    generator, wrong, right, repeats = np.random.default_rng(1), 0, 0, 200
    for _ in range(repeats):
        values = generator.normal(size=(4, 5)) + 10 * generator.normal(size=5)
        for shift in (0.0, 5.0):
            values[3] += shift
            pairs = all_pairs({str(i): dict(enumerate(map(float, row))) for i, row in enumerate(values)})
            found = {pair: adjusted for pair, (_, adjusted) in pairs.items() if adjusted is not None and adjusted < 0.05}
            wrong += bool(found) and shift == 0.0
            right += all((str(i), "3") in found for i in range(3)) and shift == 5.0
    assert len(pairs) == 6
    assert wrong <= 0.05 * repeats + 3 * math.sqrt(0.05 * 0.95 * repeats)
    assert right > 0.5 * repeats


def outcomes(**found: tuple[float | None, float]) -> list[dict[str, Any]]:
    """Rows of methods on one subject, two seeds each, by their distance and their reward; a distance of None is of a method
    that stopped. Diversity is the reward."""
    rows, same = list[dict[str, Any]](), {"factor": 1.0, "learning_rate": 1.0, "steps": 1, **dict.fromkeys(KINDS, 1)}
    for method, (distance, reward) in found.items():
        head = {"subject": "gaussian", "method": method, **same}
        rows.append(head | {"purpose": "cost", "seed": 0, "aims_at": "", "cost": {}})
        for seed in range(2):
            point = {"share": 1.0, **dict.fromkeys(KINDS, 1), "reward": reward + seed, "diversity": reward, "floor": 0.1}
            point |= {"distance": distance, "distance_base": 1.0}
            stopped = "not finite" if distance is None else None
            points = [] if stopped else [point]
            rows.append(head | {"purpose": "run", "seed": seed, "stopped": stopped, "points": points})
    return rows


def results_of(**found: tuple[float | None, float]) -> dict[str, Any]:
    """What a comparison says of `outcomes`."""
    plan = plan_of(("draft", "flow-grpo", "dpok"), tune="none")
    (each,) = results(plan, outcomes(**{name.replace("_", "-"): value for name, value in found.items()}))["results"]
    assert isinstance(each, dict)
    return each


def test_a_method_that_ran_away_is_not_called_the_best() -> None:
    """It has more reward and diversity than all others, and is not on a front; nor is one that stopped."""
    found = results_of(draft=(0.51, 9.0), flow_grpo=(0.49, 2.0), dpok=(0.2, 1.0))
    assert [m["near"] for m in found["methods"]] == [False, True, True]
    assert {key: each["best"] for key, each in found["differences"].items()} == {
        "reward": "flow-grpo",
        "distance": "dpok",
        "diversity": "flow-grpo",
    }
    assert {row["method"]: row["mean"] for row in found["differences"]["reward"]["others"]} == {"draft": 7.0, "dpok": -1.0}
    assert [m["on_front_of_distance"] for m in found["methods"]] == [False, True, True]
    assert [m["on_front_of_diversity"] for m in found["methods"]] == [False, True, False]
    lost = results_of(draft=(None, 9.0), flow_grpo=(5.0, 2.0), dpok=(2.0, 1.0))
    assert [m["near"] for m in lost["methods"]] == [False, False, False]
    assert (lost["differences"]["reward"], lost["differences"]["distance"]["best"]) == (None, "dpok")


def test_a_method_that_stopped_has_no_held_out_reward(tmp_path: Path) -> None:
    """The page, the terminal and the scoreboard say so, and show those of the others."""
    rows = outcomes(draft=(None, 9.0), dpok=(0.2, 1.0), **{"flow-grpo": (0.3, 1.0)})
    for row in rows:
        for point in row.get("points", ()):
            point |= {"held_out": {"validity": 0.8123}, "held_out_base": {"validity": 0.9}}
    found = results(plan_of(("draft", "flow-grpo", "dpok"), tune="none"), rows)
    (each,) = found["results"]
    assert [m["held_out"]["validity"]["mean"] for m in each["methods"]] == [None, 0.8123, 0.8123]
    assert each["held_out_base"]["validity"]["mean"] == 0.9
    write_json(tmp_path / "comparison.json", found)
    assert "validity" in write_comparison_report(tmp_path).read_text()
    console = Console(file=io.StringIO(), width=80)
    print_subject(console, each)
    assert console.file.getvalue().count("0.81") == 2  # type: ignore[attr-defined]
    assert set(of_methods(lines_of(found, "small", {"gaussian": 2})[0])) == {"dpok", "flow-grpo"}


def test_what_the_base_has_is_known_though_one_evaluation_could_not_say_it() -> None:
    """A method whose distance is not known with one seed has none, and nothing is said of where it is; that of the base is the
    mean over all others, and one that is further is not near."""
    rows = outcomes(draft=(2.0, 9.0), dpok=(0.2, 1.0), **{"flow-grpo": (0.3, 1.0)})
    lost = next(row for row in rows if row["method"] == "dpok" and row["purpose"] == "run")
    lost["points"][0] |= {"distance": None, "distance_base": None, "floor": None}
    (each,) = results(plan_of(("draft", "flow-grpo", "dpok"), tune="none"), rows)["results"]
    assert each["references"]["distance_base"] == {"mean": 1.0, "error": 0.0, "n": 5}
    assert {m["method"]: m["near"] for m in each["methods"]} == {"draft": False, "flow-grpo": True, "dpok": None}


def test_pairs_are_of_the_seeds_that_both_have() -> None:
    found = all_pairs({"a": {0: 1.0, 1: 2.0, 2: 9.0}, "b": {0: 0.0, 1: 2.0}, "c": {5: 1.0}})
    assert set(found) == {("a", "b")}
    assert (found["a", "b"][0].mean, found["a", "b"][0].n) == (0.5, 2)


# ---- the whole ----


def test_a_comparison_from_plan_to_page(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--num-samples", "100", *(word for text in SETTINGS for word in ("--set", text))]
    line = ["compare", "--methods", ",".join(METHODS), "--problems", "gaussian", "--seeds", "2"]
    result = CliRunner().invoke(app, [*line, "--network-evaluations", str(EVALUATIONS), "-o", str(out), *options, "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout.splitlines()[-1])
    assert content == json.loads((out / "comparison.json").read_text())
    rows = read_known(out / ROWS)
    assert len(rows) == len(METHODS) * (1 + len(FACTORS) + 2)
    assert {row["seed"] for row in rows if row["purpose"] == "tuning"} == {MOST_SEEDS}  # none that is compared
    (found,) = content["results"]
    for method in found["methods"]:
        own = [row for row in rows if row["method"] == method["method"]]
        runs = [row["points"][-1] for row in own if row["purpose"] == "run"]
        assert method["reward"]["mean"] == pytest.approx(np.mean([point["reward"] for point in runs]))
        assert method["distance"]["error"] == pytest.approx(np.std([point["distance"] for point in runs], ddof=1) / 2**0.5)
        spent = sum(row["network_evaluations"] for row in own if row["purpose"] == "tuning")
        assert method["tuning"]["network_evaluations"] == spent <= len(FACTORS) * SHARE_OF_TUNING * EVALUATIONS
    one, other = (method["reward"]["mean"] for method in found["methods"])
    of_reward = found["differences"]["reward"]
    assert of_reward["best"] == METHODS[one < other]
    assert of_reward["others"][0]["mean"] == pytest.approx(-abs(one - other))
    assert of_reward["others"][0]["low"] <= of_reward["others"][0]["mean"] <= of_reward["others"][0]["high"]
    page = (out / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)  # nothing from elsewhere
    assert all(name in page for name in (*METHODS, "light-dark(", "Holm", "data:image/png"))
    older = {key: value for key, value in content.items() if key != "near"}  # of version 0.1
    (out / "comparison.json").write_text(json.dumps(older))
    with pytest.raises(InputError, match=r"of an earlier version .* the same `tiltflow compare` writes it again"):
        write_comparison_report(out)
    again = CliRunner().invoke(app, [*line, "--network-evaluations", str(EVALUATIONS), "-o", str(out), *options])
    assert again.exit_code == 0, again.output
    assert json.loads((out / "comparison.json").read_text()) == content
    assert "[10/10] gaussian, flow-grpo, seed 1: already done" in " ".join(again.output.split())
    assert {path.name for path in (out / "pictures" / "gaussian").iterdir()} >= {"base.png", "target.png", "draft.png"}


def test_a_comparison_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    plan, told, shares = plan_of(), list[float](), dict[str, list[float]]()

    def moving(title: str, share: float, part: float) -> None:
        shares.setdefault(title, []).append(share)

    whole = compare(plan, tmp_path / "whole", watch=lambda title, what, part: told.append(part), moving=moving)
    assert sum(told) == pytest.approx(units(plan))
    assert len(shares) == len(told) == trainings(plan) + len(METHODS)  # and the looks at costs
    for title, each in shares.items():
        assert each[0] == 0, title
        assert each == sorted(each), title
        assert ("cost" in title) == (len(each) == 1), title
        assert len(each) == 1 or 0.6 < each[-1] <= 1, title

    def killed(title: str, what: str, part: float) -> None:
        if what != "already done" and title in ("gaussian, flow-grpo, learning rate x 1", "gaussian, draft, seed 1"):
            raise KeyboardInterrupt

    cut = tmp_path / "cut"
    for _ in range(2):  # at two places
        with pytest.raises(KeyboardInterrupt):
            compare(plan, cut, watch=killed)
        with open(cut / ROWS, "a") as file:
            file.write('{"purpose": "run", "sub')  # a line that was not finished
    done = {(row["purpose"], row["method"], row["seed"]) for row in read_known(cut / ROWS)}
    assert len(done) == len(METHODS) * 2 + 3  # of each method its cost and its candidates, and three runs
    again: list[str] = []
    found = compare(plan, cut, watch=lambda title, what, part: again.append(what))
    assert again.count("already done") == len(METHODS) * len(FACTORS) + 3
    assert unlike(read_known(cut / ROWS)) == unlike(read_known(tmp_path / "whole" / ROWS))
    same = [[{**m, "seconds": 0, "tuning": 0, "points": 0} for m in each["results"][0]["methods"]] for each in (found, whole)]
    assert same[0] == same[1]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_and_more_seeds_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr("tiltflow.runs.jobs.multiprocessing.get_context", lambda method: context)
    without_pictures(monkeypatch)
    few: dict[str, Any] = {"tune": "none", "methods": ("draft",)}
    compare(plan_of(**few, seeds=1), tmp_path / "a", processes=1)
    compare(plan_of(**few), tmp_path / "a", processes=2)
    compare(plan_of(**few), tmp_path / "b", processes=1)
    assert unlike(read_known(tmp_path / "a" / ROWS)) == unlike(read_known(tmp_path / "b" / ROWS))
    with pytest.raises(InputError, match=r"holds another comparison"):
        compare(plan_of(methods=("draft",)), tmp_path / "a")  # tuned
    with pytest.raises(InputError, match="already holds something"):
        compare(plan_of(**few), tmp_path)
    old = plan_of(**few).as_tree()
    assert continues(old, plan_of(methods=METHODS, tune="none", seeds=3).as_tree())
    assert not continues(old, plan_of(methods=METHODS[1:], tune="none").as_tree())
    assert not continues(old, plan_of(**few, beta=2.0).as_tree())


def test_a_method_that_diverges_is_a_row_and_a_reward_that_fails_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, plain = plan_of(methods=("draft",), tune="none", seeds=1), QuadraticReward.__call__

    def failing(answer: Callable[[], float], after: int) -> None:
        calls = [0]

        def call(self: QuadraticReward, x: Tensor) -> Tensor:
            calls[0] += 1
            return plain(self, x) * (answer() if calls[0] > after else 1.0)

        monkeypatch.setattr(QuadraticReward, "__call__", call)

    failing(lambda: 1 // 0, 5)
    found = compare(plan, tmp_path / "out")
    assert "ZeroDivisionError" in found["failed"]["gaussian, draft, seed 0"]
    assert found["results"][0]["methods"][0]["n"] == 0
    failing(lambda: math.nan, 2)
    found = compare(plan, tmp_path / "out")
    assert not found["failed"]
    assert "not finite" in found["results"][0]["methods"][0]["stopped"][0]
    assert "Stopped before the end" in (tmp_path / "out" / "report.html").read_text()


def test_samples_that_are_not_finite_are_how_a_method_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found when the trained model is measured, they are in the row, and the comparison goes on."""
    job = job_of("draft", Budget("network_evaluations", 9000))
    lost = torch.tensor([[math.inf, 0.0]]).repeat(100, 1)
    monkeypatch.setattr("tiltflow.runs.comparison.on_problem.sample", lambda *arguments, **named: lost)
    row = work(job)
    assert (row["stopped"], row["points"]) == ("samples of the tuned model are not finite", [])
    assert 0 < row["network_evaluations"] <= 9000


# ---- recipes ----


def test_methods_on_a_recipe(tmp_path: Path) -> None:
    """Each has its own defaults, its model is the recipe's, and all are measured against the law at the recipe's beta."""
    path = tiny_recipe(tmp_path)
    subject = OnRecipe.named(str(path.rename(tmp_path / "tiny.yaml")), (), None)
    assert (subject.name, subject.beta) == ("tiny", 0.1)
    recipe = subject.read(Chosen("draft", steps=7, seed=3))
    assert (recipe.method, recipe.training.max_train_steps, recipe.seed) == (tiltflow.Draft(), 7, 3)
    assert (recipe.evaluation.first.solver, recipe.evaluation.first.num_inference_steps) == ("euler", 4)
    assert (
        recipe.optimizer
        == Recipe.model_validate(
            {**{key: value for key, value in subject.tree.items() if key != "optimizer"}, "method": "draft"}
        ).optimizer
    )
    budget, chosen = Budget("network_evaluations", 2000), Chosen("draft", ("num_inference_steps=4",))
    cost = Cost(**work(Job("cost", subject, chosen, budget, tmp_path))["cost"])
    row = work(Job("run", subject, chosen, budget, tmp_path / "kept", cost=cost))
    assert row["network_evaluations"] <= 2000
    last = row["points"][-1]
    assert math.isfinite(last["reward"])
    kept = tmp_path / "kept" / "runs" / "tiny" / "draft,seed=0"
    summary = json.loads((kept / "summary.json").read_text())
    assert (summary["method"], summary["beta"], summary["reward_tuned"]) == ("draft", 0.1, last["reward"])
    assert summary["target_law"] == "p_base(x) exp(r(x) / beta)"  # though the method itself has none


def test_samples_of_the_base_are_drawn_once_for_all_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is measured with them is what is measured with samples that are drawn again."""
    path = tiny_recipe(tmp_path, evaluation={"num_samples": 64, "rewards": [{"name": "jpeg-size"}]})
    subject, drawn, plain = OnRecipe.named(str(path), (), 5.0), list[object](), Instruments.draw

    def draw(self: Instruments, model: GenerativeModel, *arguments: Any, **options: Any) -> Any:
        drawn.append(model)
        return plain(self, model, *arguments, **options)

    monkeypatch.setattr(Instruments, "draw", draw)

    def measured(first: Sequence[bool]) -> dict[str, Any]:
        trial = subject.trial(Chosen("dpok", ("num_inference_steps=4",), steps=2), "cpu")
        for _ in trial.loop(lambda end: None):
            pass
        drawn.clear()
        return [trial.measure(None, whole=whole) for whole in first][-1]

    often = measured([False, False, True])
    assert len(drawn) == 4  # of the base once, of the tuned model three times
    once = measured([True])
    assert len(drawn) == 2
    assert often == once


def test_what_is_held_out_is_measured_at_the_end_and_the_rest_on_the_way(tmp_path: Path) -> None:
    """On the way a training is measured with its own reward alone, and the numbers are those of the whole evaluation."""
    judged = {"judge": str(tiny_classifier(tmp_path / "judge", 2)), "group": [0, 2]}
    more = [{"name": "jpeg-size", "sign": "smaller"}]
    path = tiny_recipe(tmp_path, evaluation={"num_samples": 256, "rewards": more, **judged})
    subject = OnRecipe.named(str(path), (), 5.0)
    trial = subject.trial(Chosen("dpok", ("num_inference_steps=4",), steps=2), "cpu")
    for _ in trial.loop(lambda end: None):
        pass
    soon, whole = (trial.measure(None, whole=each) for each in (False, True))
    same = ("reward", "reward_error", "reward_base", "reward_target", "distance", "diversity", "effective_sample_size")
    assert {key: soon[key] for key in same} == {key: whole[key] for key in same}
    assert soon["distance"] > 0  # that of the judge's classes; its floor is drawn
    assert soon["floor"] == pytest.approx(whole["floor"], rel=0.1)
    assert soon["held_out"] == {}
    assert soon["path_kl"] is None
    assert whole["path_kl"] is not None
    assert set(whole["held_out"]) == set(whole["held_out_base"]) == {"jpeg-size"}
    row = {"purpose": "run", "subject": subject.name, "method": "dpok", "seed": 0, "factor": 1.0, "learning_rate": 1e-3}
    row |= {"stopped": None, "steps": 2, "points": [{"share": 1.0, **dict.fromkeys(KINDS, 1), **whole}]}
    cost = row | {"purpose": "cost", "aims_at": "it"}
    plan = Plan({"dpok": ()}, (subject,), 1, Budget("seconds", 1.0), "none")
    write_json(tmp_path / "comparison.json", results(plan, [cost, row]))
    page = write_comparison_report(tmp_path).read_text()
    assert decimal(whole["held_out"]["jpeg-size"]) in page
    assert "path KL" in page
    assert f"jpeg-size {decimal(whole['held_out_base']['jpeg-size'])} of the base" in page


def test_a_black_box_is_compared_and_named_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that need a gradient are refused before any method is tried; those that do not are compared, and the results and
    the page say that the reward has none."""
    path = tiny_recipe(tmp_path, reward={"name": "jpeg-size", "sign": "smaller"}, method={"name": "dpok", "beta": 5.0})
    words = ["compare", "--recipes", str(path.rename(tmp_path / "tiny.yaml")), "--seeds", "1", "--network-evaluations", "1500"]
    words += ["--tune", "none", "-o", str(tmp_path / "out"), "--set", "dpok.num_inference_steps=4"]
    with monkeypatch.context() as patched:
        patched.setattr("tiltflow.runs.comparison.on_recipe.ready", lambda *arguments: pytest.fail("loaded"))
        refused = CliRunner().invoke(app, [*words, "--methods", "dpok,draft"])
    assert "reward 'jpeg-size' has no gradient, and method 'draft' needs one" in str(refused.exception)
    assert not (tmp_path / "out" / ROWS).exists()
    result = CliRunner().invoke(app, [*words, "--methods", "dpok"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["results"]
    assert (found["black_box"], found["beta"], found["methods"][0]["n"]) == (True, 5.0, 1)
    assert "the reward is a black box" in (tmp_path / "out" / "report.html").read_text()
    smooth = tiny_recipe(tmp_path, method={"name": "dpok", "beta": 5.0})
    assert not OnRecipe.named(str(smooth.rename(tmp_path / "smooth.yaml")), (), None).black_box


# ---- refusals ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "draf"], "there is no method 'draf', did you mean 'draft'?"),
        (["--problems", "gausian"], "there is no problem 'gausian', did you mean 'gaussian'?"),
        (["--problems", "lqg", "--methods", "tilt-matching"], "its law is that of one chain (solver euler-maruyama, num_inf"),
        (["--problems", "lqg", "--set", "lqg.state_cost=1"], "method 'draft' rewards the ends of paths alone; use adjoint"),
        (
            ["--problems", "bandit", "--num-samples", "100", "--set", "bandit.observations=[0, 0.2, 0.4, 0.6]"],
            "--num-samples must be 120 or more for the 4 observations of bandit, is 100",
        ),
        (["--problems", "utility"], "problem 'utility' is not of p_base(x) exp(r(x) / beta)"),
        (["--problems", "", "--recipes", "digits-evn"], "there is no recipe 'digits-evn', did you mean 'digits-even'?"),
        (["--problems", ""], "give --problems"),
        (["--methods", ","], "give methods to compare"),
        (["--methods", "draft,draft"], "'draft' is there twice"),
        (["--seeds", "0"], "--seeds must be 1 to 1000, is 0"),
        (["--seconds", "3"], "two budgets (--network-evaluations, --seconds): give exactly one"),
        (["--network-evaluations", "-1"], "--network-evaluations must be positive"),
        (["--network-evaluations", "1000"], "its first optimizer step alone costs"),
        (["--beta", "0"], "--beta must be positive"),
        (["--tune", "all"], "--tune all: must be one of learning-rate, none"),
        (["--set", "draft.num_step=1"], "'num_step' is not a setting"),
        (["--set", "draft.beta=1"], "that of the target law, for all methods: --beta"),
        (["--set", "draff.num_steps=1"], "did you mean 'draft'?"),
        (["--set", "gaussian.dimensoin=1"], "'dimensoin' is not a setting, did you mean 'dimension'?"),
        (["--problems", "", "--recipes", "digits-png", "--methods", "draft"], "has no gradient, and method 'draft' needs one"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiltflow.runs.comparison.compare.attempt", lambda job: pytest.fail("trained"))
    defaults = {"--methods": "draft", "--problems": "gaussian", "--seeds": "1", "--network-evaluations": "1e5"}
    given = dict(zip(words[::2], words[1::2], strict=True))
    line = [word for pair in (defaults | given).items() for word in pair]
    result = CliRunner().invoke(app, ["compare", *line, "-o", str(tmp_path / "out")])
    assert isinstance(result.exception, InputError), result.output
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "out" / ROWS).exists()


def test_no_budget_is_refused() -> None:
    with pytest.raises(InputError, match=r"no budget \(--network-evaluations, --reward-evaluations, --seconds\)"):
        tiltflow.compare(["draft"], ["gaussian"], output="out")


def test_the_pictures_of_all_methods_have_one_frame(tmp_path: Path) -> None:
    trial = OnProblem("gaussian", SMALL, num_samples=100).trial(Chosen("draft"), "cpu")
    with torch.no_grad():
        trial.measure(tmp_path, whole=False)
    drawn = (tmp_path / "pictures" / "gaussian" / "target.png").read_bytes()
    problem = cast(Gaussian, trial.problem)
    trial.tuned = Flow(ExactVelocity(problem.base().tilt(problem.reward(), 0.2)))
    trial.measure(tmp_path, whole=False)
    assert (tmp_path / "pictures" / "gaussian" / "target.png").read_bytes() == drawn
