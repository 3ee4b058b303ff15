"""Molecules tuned toward a utility, where it is known what comes out; the shipped recipes, and the benchmark, in small."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
from test_molecules_shown import ATOMS, Lookup, carbons

import tiltflow
from tiltflow.chemistry.workers import Workers
from tiltflow.flows.flow import Flow
from tiltflow.runs.recipe import Recipe, find_recipe, read_recipe, read_recipe_tree
from tiltflow.runs.run import run
from tiltflow.runs.staged.recipe import StagedRecipe
from tiltflow.runs.staged.run import run_stages
from tiltflow.settings import validate
from tiltflow.utilities.superquantile import Superquantile

STEPS = 16
METHODS = ("adjoint-matching", "score-as-action", "tilt-matching", "path-reweighted")
RECIPES = ("qm9-energy", "qm9-isomers", "qm9-superquantile")
REACHED = {
    "qm9-strain": (-1000, 0),
    "qm9-validity": (0, 1),
    "qm9-dipole": (700, 760),  # with 25 for a hartree, of which there are 29 to 29.6
    "qm9-energy-tilt-matching": (10, 40),
    "qm9-isomers-tilt-matching": (10, 32),
}
"""Limits of a reward, of recipes of other methods."""
SMALL = ["method.num_inference_steps=8", "sampling.num_inference_steps=8", "evaluation.num_samples=40"]
installed = pytest.mark.skipif(importlib.util.find_spec("tblite") is None, reason="the extra molecules is not installed")


def test_the_best_half_of_molecules_stage_by_stage() -> None:
    """Of four molecules of 1, 2, 2 and 4 carbons, all equally likely. The best half has a mean of 3. Its first variation,
    2 (r - 2)+, is 4 for the last molecule alone: a stage at the temperature 8 makes that exp(1/2) times as likely beside the
    others, and so does the next one. A share s below a half makes a mean of 2 + 4 s."""
    model = tiltflow.Model(Flow(Lookup(), "x1"), (ATOMS, 8), tiltflow.Sampling(solver="memoryless", num_inference_steps=STEPS))
    law = tiltflow.OfLaw(Superquantile(share=0.5), rewards={"reward": carbons}, num_samples=1000)
    method = tiltflow.PathReweighted(beta=8.0, num_inference_steps=STEPS)
    training = tiltflow.Training(max_train_steps=64, train_batch_size=512)
    optimizer = tiltflow.Optimizer(learning_rate=0.05)
    odds = 1 / 3
    for stage in tiltflow.stages(model, law, method, training, count=2, optimizer=optimizer):
        odds *= math.exp(1 / 2)
        share = odds / (1 + odds)
        network: Any = stage.model.flow.network
        found = network.log_shares.detach().softmax(0).tolist()
        assert found == pytest.approx([(1 - share) / 3] * 3 + [share], abs=0.04)
        assert stage.after is not None
        assert stage.after.value == pytest.approx(2 + 4 * share, abs=0.16 + 3 * stage.after.standard_error)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_molecules_sample_and_train_on_one_grid(name: str) -> None:
    """That of the model."""
    recipe = read_recipe(read_recipe_tree(find_recipe(name, "train"), []), name)
    assert isinstance(recipe.model, str)
    method: Any = recipe.method
    assert method.sampling.times(0.0).tolist() == recipe.evaluation.first.sampling.times(0.0).tolist()
    assert method.shift == tiltflow.load(recipe.model).sampling.shift


@installed
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the reward could not be computed")  # samples of eight steps are rarely molecules
@pytest.mark.parametrize("name", [*RECIPES, *REACHED])
def test_recipes_of_molecules_in_small(name: str, tmp_path: Path) -> None:
    of_stages = ["stages.count=2", "stages.num_samples=40", "method.pool={tail: 2, body: 2}", "utility.share=0.5"]
    more = ["training.max_train_steps=2", "training.train_batch_size=40", *(of_stages if name == RECIPES[2] else [])]
    recipe = read_recipe(read_recipe_tree(find_recipe(name, "train"), [*SMALL, *more]), name)
    if isinstance(recipe, StagedRecipe):
        summary = run_stages(recipe, tmp_path / "run")
        assert len(summary["stages"]) == 2
        assert 20 < summary["utility_after"] < 32
    else:
        summary = run(recipe, tmp_path / "run")
        low, high = REACHED.get(name, (10, 32))
        assert low < summary["reward_tuned"] < high
        assert summary["molecules"]["gain_in_std"] is not None


@installed
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_xtb_is_called_once_for_each_sample_that_is_drawn(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, step by step; and where a run ends."""
    asked, found, ask = list[int](), list[tuple[int, int]](), Workers.map

    def counted(workers: Workers, function: Any, items: Any) -> Any:
        asked.append(len(items) if function.__name__ == "single_point" else 0)
        return ask(workers, function, items)

    def record(each: Any) -> bool:
        found.append((sum(asked), each.samples_drawn))
        return bool(each.samples_drawn >= 16)

    monkeypatch.setattr(Workers, "map", counted)
    sets = [*SMALL, "training.train_batch_size=8", f"method={{name: {method}, beta: 0.03, num_inference_steps: 8, shift: 0.4}}"]
    recipe = validate(Recipe, read_recipe_tree(find_recipe("qm9-isomers", "train"), sets), method)
    run(recipe, tmp_path / "run", callbacks=[record])
    first = found[0][0] - found[0][1]  # what was asked for before the first step, to try the reward
    assert found[-1][1] == 16
    assert [calls - first for calls, _ in found] == [drawn for _, drawn in found]
