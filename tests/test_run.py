"""A training run from recipe to report, on tiny random models."""

from __future__ import annotations

import html
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_flow, tiny_recipe

import tiltflow
from tiltflow.conditions import Item
from tiltflow.control.path_weights import draw_paths
from tiltflow.errors import InputError
from tiltflow.evaluation.distances import kolmogorov_smirnov, reward_distance
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.evaluation.metrics.distance_to_base import distance_to_base
from tiltflow.evaluation.samples import Asked, Instruments
from tiltflow.flows.field import FunctionField
from tiltflow.laws.gaussian_mixture import GaussianMixture
from tiltflow.laws.target import exponential_tilt
from tiltflow.problems.gaussian import Gaussian
from tiltflow.runs.caveats import annealing_in_words, budget_in_words, calibration_in_words, modes_in_words, reach_in_words
from tiltflow.runs.evaluate import of_paths
from tiltflow.runs.recipe import Recipe, read_recipe, shipped_recipes
from tiltflow.runs.run import evaluate_run, model_card, read_run, run
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import apply_overrides, read_yaml, validate
from tiltflow.streams import stream
from tiltflow.training.trainer import Record


def recipe_of(path: Path, *overrides: str) -> Recipe:
    return validate(Recipe, apply_overrides(read_yaml(path), overrides), "recipe")


IMPORTS = """
import sys
from pathlib import Path
from tiltflow.runs import run
from tiltflow.runs.recipe import Recipe
from tiltflow.settings import read_yaml, validate
evaluate = run.evaluate

def counted(*arguments, **options):
    before = set(sys.modules)
    summary = evaluate(*arguments, **options)
    print("later:", *sorted(name for name in set(sys.modules) - before if name.startswith("tiltflow")))
    return summary

run.evaluate = counted
run.run(validate(Recipe, read_yaml(Path(sys.argv[1])), "recipe"), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_an_evaluation_imports_nothing_of_ours(tmp_path: Path) -> None:
    """All is there before the first step: source files may change while a run trains."""
    path = tiny_recipe(tmp_path, training={"max_train_steps": 1, "train_batch_size": 4})
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS, str(path), str(tmp_path / "run")]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "later:" in found.stdout.splitlines()


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Of a tilt that 256 base samples know well."""
    recipe = recipe_of(tiny_recipe(tmp_path), "evaluation.num_samples=256", "method.beta=0.5")
    return tmp_path / "run", run(recipe, tmp_path / "run")


def test_everything_a_run_makes_lies_in_its_folder(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "recipe.yaml", "fingerprints.json", "metrics.jsonl", "checkpoints", "model", "base",
        "before.png", "after.png", "summary.json", "report.html",
    }  # fmt: skip
    assert json.loads((folder / "summary.json").read_text()) == summary
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # the tuned chain: 3 controlled steps rolled out, 3 regressed; the base: 3 products and 1 forward; 4 samples, 4 times
    assert summary["network_evaluations"] == rows[-1]["network_evaluations"] == (3 + 3 + 3 + 1) * 4 * 4
    for key in ("reward_base", "reward_tuned", "target_distance", "effective_sample_size", "seconds"):
        assert isinstance(summary[key], float)
    for key in ("base", "tuned", "target"):
        assert sum(summary["judge"][key]) == pytest.approx(1)
    assert summary["target_unknown"] is None
    names = {row["statistic"] for row in summary["tests"]}
    assert {"mean reward", "distance in reward", "total variation of the classes"} <= names
    assert 0 < summary["reward_distance_floor"] < 1
    assert summary["path_kl"] > 0
    assert summary["path_kl_error"] > 0
    assert summary["path_kl_target"] > 0
    assert summary["verdict"]["text"] in html.unescape((folder / "report.html").read_text())


def test_a_target_that_is_not_known_is_said_to_be(tmp_path: Path) -> None:
    """32 samples, which cannot weigh as much as 100: no number of the target law, no verdict, in every place the same words."""
    summary = run(recipe_of(tiny_recipe(tmp_path)), tmp_path / "run")
    assert "32 base samples have an effective sample size of" in summary["target_unknown"]
    of_target = [key for key in summary if key.startswith(("reward_target", "target_distance", "reward_distance", "path_kl_t"))]
    assert len(of_target) >= 9
    assert {summary[key] for key in of_target} == {None}
    assert summary["judge"]["target"] is summary["judge"]["group"]["target"] is None
    assert summary["tests"] == []
    assert summary["verdict"]["text"].startswith("No verdict: the target law is unknown.")
    page = (tmp_path / "run" / "report.html").read_text()
    assert summary["target_unknown"] in page


def test_the_path_kl_is_fresh_and_bounds_the_divergence_of_the_samples(tmp_path: Path) -> None:
    """Of two flows that differ by a constant velocity it is that of the definition, without noise; where a method tunes a
    solver without noise there is none, and the reason."""
    recipe = recipe_of(tiny_recipe(tmp_path), "sampling.shift=2.0", "evaluation.num_samples=16")
    base = tiltflow.load(tmp_path / "flow")
    network = base.flow.network

    class Moved(torch.nn.Module):
        def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return network(x, time) + 0.03

    def found_of(recipe: Recipe, tuned: Any) -> dict[str, Any]:
        asked, target = Asked.of_samples(16), exponential_tilt(1.0)
        instruments = Instruments({"ink": lambda x: x.mean((1, 2, 3))}, None, None, 16, "cpu")
        return of_paths(recipe, target, tuned, base, asked, instruments, lambda rewards, asked: rewards)

    found = found_of(recipe, replace(base, flow=replace(base.flow, network=Moved())))
    chain = Sampling(num_inference_steps=4, shift=2.0).chain()
    assert found["path_kl"] == pytest.approx((chain.control_scale**2).sum().item() / 2 * 0.03**2 * 64, rel=1e-3)
    assert found["path_kl_error"] < 1e-3 * found["path_kl"]
    assert (
        abs(found["achieved_tilt_path"]) > 4 * found["achieved_tilt_path_error"] > 0
    )  # a shift of all pixels is one of the ink
    of_base = found_of(recipe, base)
    assert of_base["path_kl"] == of_base["achieved_tilt_path"] == 0
    assert of_base["achieved_tilt_path_r2"] is None
    ode = recipe_of(tmp_path / "recipe.yaml", "method={name: score-as-action, solver: euler, estimator: pathwise}")
    absent = found_of(ode, base)
    assert absent["path_kl"] is absent["achieved_tilt_path"] is None
    assert "no noise" in absent["path_kl_absent"]


def test_the_path_kl_of_a_tilted_normal_law_is_that_of_the_law(generator: torch.Generator) -> None:
    """N(0, 1) tilted by exp(c x) is N(c, 1): KL c^2 / 2. In many steps the memoryless paths of the two exact velocities are as
    far apart, and never nearer."""
    base, shift = Gaussian(dimension=1, mean=0.0, scale=1.0).base(), 0.8
    tilted = GaussianMixture(base.log_weights, base.means + shift, base.variances)
    x = torch.randn(4000, 1, generator=generator)
    for steps, slack in ((40, 0.15), (320, 0.03)):
        chain = Sampling(num_inference_steps=steps).chain()
        of_tuned, of_base = (FunctionField(law.velocity) for law in (tilted, base))
        costs = draw_paths(chain, of_tuned, of_base, x, torch.zeros(len(x), dtype=torch.bool), generator).costs
        error = 4 * costs.std().item() / len(costs) ** 0.5
        assert costs.mean().item() == pytest.approx(shift**2 / 2, rel=slack, abs=error)


def test_a_run_that_ends_before_its_inverse_temperature_says_so() -> None:
    (said,) = annealing_in_words(0.5, {"inverse_temperature": 1.5})
    assert "had risen to 2: it aimed at p_base(x) exp(1.5 r(x))" in said
    (said,) = annealing_in_words(0.5, {"inverse_temperature": 2.0, "beta": 0.25})  # calibrated
    assert "had risen to 4: it aimed at p_base(x) exp(2 r(x))" in said
    for record in ({"inverse_temperature": 2.0}, {"inverse_temperature": 2.1}, {}):
        assert annealing_in_words(0.5, record) == []
    assert annealing_in_words(None, {"inverse_temperature": 1.0}) == []


def test_a_law_that_is_no_tilt_is_said() -> None:
    """By the method, or else by a sentence of how near a tilt it is."""
    assert reach_in_words(exponential_tilt(1.0)) == []
    assert reach_in_words(exponential_tilt(1.0, ["because"])) == ["because"]
    for reaches, words in (("first-order", "first order"), ("none", "No exponential tilt")):
        (said,) = reach_in_words(exponential_tilt(1.0, reaches=reaches))
        assert words in said
        assert reach_in_words(exponential_tilt(1.0, ["because"], reaches)) == ["because"]


@pytest.mark.parametrize(("working", "at_limit"), [(0.701, True), (0.72, True), (1.2, False), (2.1, False), (6.2, True)])
def test_calibration_at_its_limit_is_said(working: float, at_limit: bool) -> None:
    found = calibration_in_words(2.1, working)
    assert found["calibration_at_limit"] is at_limit
    assert bool(found["limits"]) is at_limit
    if at_limit:
        assert f"a temperature of {working:.3g} where 2.1 was asked for" in found["limits"][0]
    assert calibration_in_words(2.1, None) == {"calibration_at_limit": None, "limits": []}


def test_a_kl_budget_names_the_target_law(tmp_path: Path) -> None:
    """It is that of the temperature that was held in the last quarter, which the summary, the report and the terminal say."""
    path = tiny_recipe(tmp_path, training={"max_train_steps": 16, "train_batch_size": 4, "target_kl": 0.3})
    summary = run(recipe_of(path, "evaluation.num_samples=256"), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["beta"] == pytest.approx(0.1)
    assert rows[1]["beta"] != rows[0]["beta"]
    assert summary["beta"] == summary["working_beta"] == rows[-1]["beta"] == rows[-4]["beta"]
    assert summary["target_kl"] == 0.3
    assert summary["calibration_at_limit"] is None
    assert summary["kl_reached"] == pytest.approx(sum(row["path_kl"] for row in rows[-4:]) / 4)
    assert any("KL budget of 0.3 nats was not met" in limit for limit in summary["limits"])  # in 16 steps
    page = html.unescape((tmp_path / "run" / "report.html").read_text())
    assert "KL budget" in page
    assert "a KL budget of 0.3 nats" in (tmp_path / "run" / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "aim"), [("diffusion-nft", "no law that is known; "), ("ram", "p_base(x) exp(r(x) / beta), ")]
)
def test_the_card_of_a_tuned_model_names_its_law_where_there_is_one(method: str, aim: str, tmp_path: Path) -> None:
    assert f"Aims at {aim}" in model_card(recipe_of(tiny_recipe(tmp_path), f"method={{name: {method}}}"))


def test_a_kl_budget_that_was_met_or_not() -> None:
    def records(kl: float, *, limit: float = 0.0, key: str = "path_kl") -> list[dict[str, float]]:
        return [
            {"step": i, "beta": 2.0 if i > 30 else 1.0, "beta_at_limit": limit, key: kl + i % 2 * 1e-3} for i in range(1, 41)
        ]

    assert budget_in_words(None, records(0.5)) == {"target_kl": None, "limits": []}
    met = budget_in_words(0.5, records(0.53))
    assert met["kl_reached"] == pytest.approx(0.5305)
    assert met["limits"] == []
    (missed,) = budget_in_words(0.5, records(0.4))["limits"]
    assert missed.startswith("The KL budget of 0.5 nats was not met: at the temperature 2, which the run ended with, the KL is")
    assert missed.endswith("a longer run has more time to find it.")
    (limited,) = budget_in_words(0.5, records(0.7, limit=1.0, key="kl"))["limits"]
    assert "cannot be tilted so far" in limited
    (unseen,) = budget_in_words(0.5, records(0.7, key="other"))["limits"]
    assert "no KL was measured" in unseen


def test_a_model_that_has_not_found_a_mode_says_so() -> None:
    """Two modes eight standard deviations apart, of which one was asked for: a path KL of .038 of .336."""
    far = {"path_kl": 0.038, "path_kl_error": 0.002, "path_kl_target": 0.336, "path_kl_target_error": 0.02}
    tilt = {"achieved_tilt": 0.06, "achieved_tilt_error": 0.01}
    (said,) = modes_in_words(far | tilt)
    assert said.startswith(
        "The paths spend 0.038 of the 0.34 nats that the target law costs, and the model has 0.06 of the tilt"
    )
    for change in (
        {"achieved_tilt": 0.49},
        {"achieved_tilt": None},
        {"path_kl": 0.17},
        {"path_kl_target": 0.1, "path_kl_target_error": 0.015},
        {"path_kl": None},
        {"path_kl_target": None},
    ):
        assert modes_in_words(far | tilt | change) == []


def test_the_folder_alone_is_enough(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, summary = finished
    moved = folder.rename(tmp_path / "moved")
    for path in (tmp_path / "flow").iterdir():  # the base that the recipe names is gone
        path.unlink()
    again = evaluate_run(moved)
    assert {k: again[k] for k in ("reward_tuned", "target_distance")} == {
        k: summary[k] for k in ("reward_tuned", "target_distance")
    }
    assert tiltflow.load(moved).sample(3).shape == (3, 1, 8, 8)
    assert read_run(moved).training.max_train_steps == 4


def test_the_same_recipe_is_the_same_run_bit_for_bit(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, summary = finished
    again = run(recipe_of(folder / "recipe.yaml"), tmp_path / "again")
    first, second = (load_file(path / "model" / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert again["target_distance"] == summary["target_distance"]
    other = run(recipe_of(folder / "recipe.yaml", "seed=1"), tmp_path / "other")
    assert other["reward_tuned"] != summary["reward_tuned"]


def test_training_raises_the_reward_and_the_base_is_untouched(tmp_path: Path) -> None:
    before = (tiny_flow(tmp_path / "flow") / "model.safetensors").read_bytes()
    summary = run(
        recipe_of(tiny_recipe(tmp_path), "training.max_train_steps=40", "reward={name: ink}", "method.beta=0.01"),
        tmp_path / "r",
    )
    assert summary["reward_tuned"] > summary["reward_base"] + 10 * summary["reward_base_error"]
    assert (tmp_path / "flow" / "model.safetensors").read_bytes() == before


def test_an_interrupt_saves_and_evaluation_goes_on_from_there(tmp_path: Path) -> None:
    def stop(record: Record) -> None:
        if record.step == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(recipe_of(tiny_recipe(tmp_path)), folder, callbacks=[stop])
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert evaluate_run(folder)["iterations"] == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward={name: png-size}", "reward 'png-size' has no gradient, and method 'adjoint-matching' needs one"),
        ("model=digits-fow", "there is no model 'digits-fow', did you mean 'digits-flow'"),
        ("evaluation.judge=nobody", "there is no model 'nobody'"),
        ("evaluation.group=[0, 9]", "evaluation.group names class 9, the judge has 0 to 2"),
        ("reward.classes=[0, 7]", "7"),
    ],
)
def test_a_part_that_cannot_be_had_stops_before_anything_is_written(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        run(recipe_of(tiny_recipe(tmp_path), override), tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_occupied_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="already holds something"):
        run(recipe_of(tiny_recipe(tmp_path)), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_every_shipped_recipe_is_valid() -> None:
    for name, path in shipped_recipes("train").items():
        assert read_recipe(read_yaml(path), name).description


def test_tune_in_five_lines() -> None:
    base = tiltflow.Model(tiltflow.Flow(torch.nn.Linear(2, 2)), (2,))
    base.flow.network.forward = lambda x, time: -x  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="does not depend on its parameters"):
        tiltflow.tune(base, lambda x: x.sum(1), tiltflow.AdjointMatching(), tiltflow.Training(max_train_steps=1))


def test_reward_distance_of_a_shifted_normal_is_its_closed_form() -> None:
    """Base reward N(0, 1), tilt by exp(r): the target is N(1, 1). Samples from the base are 2 Phi(1/2) - 1 = 0.3829 away."""
    base = torch.randn(200_000, generator=stream(0, "base"), dtype=torch.float64)
    weights = ImportanceWeights.from_rewards(base, 1.0)
    generator = stream(0, "bootstrap")
    exact = torch.randn(50_000, generator=stream(0, "exact"), dtype=torch.float64) + 1
    assert reward_distance(base[:50_000], base, weights, generator, resamples=2).value == pytest.approx(0.3829, abs=0.01)
    # Kolmogorov's distribution: above 1.63 / sqrt(n) once in a hundred; the weights are worth e^-1 of their number
    assert reward_distance(exact, base, weights, generator, resamples=2).value < 1.63 * (1 / 50_000 + 2.72 / 200_000) ** 0.5


def test_kolmogorov_smirnov_with_ties() -> None:
    x, y = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0])
    assert kolmogorov_smirnov(x, y, torch.full((3,), 1 / 3, dtype=torch.float64)) == pytest.approx(1 / 3)
    assert kolmogorov_smirnov(x, x, torch.full((3,), 1 / 3, dtype=torch.float64)) == pytest.approx(0)
    assert kolmogorov_smirnov(torch.tensor([0.0]), torch.tensor([1.0]), torch.ones(1)) == 1


def test_a_calibrated_run_trains_what_it_was_told_to(tmp_path: Path) -> None:
    path = tiny_recipe(tmp_path)
    overrides = ["method.beta=0.5", "training.trainable=^leave"]
    summary = run(recipe_of(path, *overrides, "training.calibration_samples=256"), tmp_path / "run")
    plain = run(recipe_of(path, *overrides), tmp_path / "plain")
    assert summary["network_evaluations"] - plain["network_evaluations"] == 256 * 4  # the chain has four steps
    assert summary["beta"] == 0.5
    assert summary["calibration_at_limit"] is False
    assert plain["calibration_at_limit"] is None
    assert 0.5 / 3 <= summary["working_beta"] <= 0.5 * 3
    assert summary["working_beta"] != 0.5
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "flow", tmp_path / "run" / "model"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("leave")}
    assert "trainable: ^leave" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.trainable=inner",
            "training.trainable: no parameter name matches 'inner'; the network's parts are time, ",
        ),
        ("training.trainable=(", "training.trainable"),
        ("training.calibration_samples=8", "calibration: 8 base samples have an effective sample size of"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing_behind(tmp_path: Path, override: str, message: str) -> None:
    path = tiny_recipe(tmp_path)
    with pytest.raises(InputError) as error:
        run(recipe_of(path, override), tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def one_state(velocity: Any, x: torch.Tensor, times: torch.Tensor) -> list[torch.Tensor]:
    return [x]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.solver=test_run:one_state"], "a list of 5 states, one for each time, got 1 states"),
        (["sampling.solver=nowhere:f"], "there is no module 'nowhere'"),
        (["sampling.solver=euler-maruyama"], "needs a diffusion model"),
        (["method={name: score-as-action, solver: 'test_run:one_state'}"], "a list of 41 states"),
        (["method={name: score-as-action, critic: {form: 'test_value:broken_at_the_end'}}"], "skip\\(1\\) must be 1"),
    ],
)
def test_what_cannot_work_is_found_before_anything_is_written(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(recipe_of(tiny_recipe(tmp_path), *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_distance_to_the_base() -> None:
    """A law moved by 3 is 3 away, whatever the noise; halves of one sample are as far apart as finite samples are."""
    x = torch.randn(1000, 1, generator=stream(0, "test"))
    asked = Asked.of_samples(1000)
    found = distance_to_base(x + 3, x, asked)
    assert found["w2_base"] == pytest.approx(3, abs=0.25)
    assert 0 < found["w2_floor"] < 0.25
    assert distance_to_base(x, x, asked)["w2_base"] == found["w2_floor"]


def test_both_halves_have_every_group() -> None:
    """Of two classes 10 apart: a distance between halves of different classes would be 10."""
    classes = Asked.of_classes([Item("a", {"label": 0}), Item("b", {"label": 1})], 400)
    first, last = classes.halves(1024)
    assert (first.tolist(), last.tolist()) == ([*range(100), *range(200, 300)], [*range(100, 200), *range(300, 400)])
    x = torch.randn(400, 1, generator=stream(0, "test")) + 10 * (torch.arange(400) >= 200).float()[:, None]
    assert distance_to_base(x, x, classes)["w2_floor"] < 0.5
    few, _ = classes.halves(20)
    assert few.tolist() == [*range(10), *range(200, 210)]
