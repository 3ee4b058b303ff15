"""Advice: facts of a recipe by closed forms, rules that choose one thing each, pages that exist, commands that can be typed."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_recipe
from typer.testing import CliRunner

from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError
from tiltflow.runs.advice.facts import REACHABLE, Facts, numbers
from tiltflow.runs.advice.rules import RULES, advise
from tiltflow.runs.recipe import Recipe, find_recipe, read_recipe_tree
from tiltflow.settings import validate

DOCS = Path(__file__).parent.parent / "docs"
USUAL = Facts(
    differentiable=True,
    learned=False,
    method="dpok",
    calibrated=False,
    dimension=784,
    conditions=1,
    few_steps="",
    beta=0.5,
    count=64,
    effective=20.0,
    kl=0.6,
    spread=1.1,
    reachable=0.5,
    modest=0.6,
    evaluation=None,
)


def chosen(**changes: Any) -> dict[str, str]:
    """What is advised, by what it is about."""
    return {each.about: each.choice for each in advise(replace(USUAL, **changes))}


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "adjoint-matching"),
        ({"differentiable": False}, "tilt-matching"),
        ({"effective": 1.0}, "adjoint-matching"),  # weights of paths were not measured in so many dimensions
        ({"effective": 1.0, "differentiable": False}, "tilt-matching"),
        ({"effective": 1.0, "dimension": 2}, "path-reweighted after adjoint-matching"),
        ({"effective": 1.0, "dimension": 2, "differentiable": False}, "path-reweighted after tilt-matching"),
        ({"learned": True, "effective": 1.0, "dimension": 2}, "score-as-action"),
    ],
)
def test_the_method_follows_from_the_reward_and_the_tilt(changes: dict[str, Any], method: str) -> None:
    assert chosen(**changes)["method"] == method


def test_where_it_was_measured_to_be_nearer_a_method_without_gradients_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was measured is the reason; not for a tilt that hardly any base sample resembles."""

    def board(of_regression: float) -> None:
        numbers = {"tilt-matching": of_regression, "adjoint-matching": 3.0, "refl": 1.5}
        methods = [
            {"method": name, "stopped": [], "distance": {"mean": value}, "floor": {"mean": 1.0}}
            for name, value in numbers.items()
        ]
        budget = {"kind": "network_evaluations", "amount": 400_000}
        line = {"kind": "problem", "subject": "here", "dimension": 16, "seeds": 5, "budget": budget, "methods": methods}
        monkeypatch.setattr("tiltflow.runs.advice.scoreboard.read", lambda: [line])

    board(1.9)
    first = next(iter(advise(replace(USUAL, dimension=16))))
    assert first.choice == "tilt-matching"
    assert "with 400,000 network evaluations, it ended at 1.9 times the floor" in first.why
    assert "refl at 1.5" in first.why
    assert chosen(dimension=16)["sampling"] == "heun"  # it learns a field
    assert chosen(dimension=16, effective=1.0)["method"] == chosen(dimension=784)["method"] == "adjoint-matching"
    board(2.1)
    first = next(iter(advise(replace(USUAL, dimension=16))))
    assert first.choice == "adjoint-matching"
    assert "it ended at 3.0 times the floor of the distance to the target law, refl at 1.5 (5 seeds)" in first.why
    without = next(iter(advise(replace(USUAL, dimension=16, differentiable=False))))
    assert "it ended at 2.1 times the floor of the distance to the target law (5 seeds)" in without.why  # refl has no gradient


def test_the_page_says_what_is_advised() -> None:
    """docs/which-method.md, of each number of dimensions, by the scoreboard that ships."""
    page = (DOCS / "which-method.md").read_text(encoding="utf-8")
    ((first, last),) = {match.groups() for match in re.finditer(r"in (\d+) to (\d+)\s+dimensions", page)}
    for dimension in range(1, 400):
        regression = int(first) <= dimension <= int(last)
        assert chosen(dimension=dimension)["method"] == ("tilt-matching" if regression else "adjoint-matching"), dimension
        assert chosen(dimension=dimension, differentiable=False)["method"] == "tilt-matching"


def test_the_temperature_follows_from_the_weights_of_base_samples() -> None:
    assert chosen()["temperature"] == "beta = 0.5, as it is"
    assert chosen(effective=1.2, reachable=2.0)["temperature"].startswith("beta = 2 or more")
    assert chosen(effective=63.9)["temperature"] == "beta = 0.6 for a tilt of half a nat"
    assert chosen(effective=63.9, modest=None)["temperature"] == "beta = 0.5, as it is"


def test_other_advice_is_given_where_it_holds() -> None:
    assert "sampling" not in chosen()
    assert chosen(differentiable=False)["sampling"] == "heun"
    assert "distilled" in chosen(differentiable=False, few_steps="it was distilled.")["sampling"]
    assert chosen()["settings"] == "training.calibration_samples = 1024"
    for changes in ({"calibrated": True}, {"conditions": 2}, {"effective": 1.0}, {"differentiable": False}):
        assert "settings" not in chosen(**changes)
    assert chosen(evaluation=("too few", "num_samples=5"))["evaluation"] == "num_samples=5"
    assert chosen()["without training"].endswith("about 3 candidates for each")
    assert "without training" not in chosen(effective=6.0)


def headings(page: str) -> set[str]:
    """The anchors of a page, as they are made of its headings."""
    found = re.findall(r"(?m)^#+ (.*)$", (DOCS / page).read_text())
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


def test_every_rule_names_a_section_that_exists() -> None:
    for rule in RULES:
        page, _, section = rule.page.partition("#")
        assert (DOCS / page).exists(), rule.page
        assert not section or section in headings(page), rule.page


def test_all_that_is_advised_is_a_recipe() -> None:
    """For every combination of facts, one thing of each kind, and settings that a recipe takes."""
    tree = read_recipe_tree(find_recipe("digits-ink", "train"), [])
    for differentiable, learned, effective, dimension in product((False, True), (False, True), (1.0, 20.0, 63.9), (2, 784)):
        facts = {"differentiable": differentiable, "learned": learned, "effective": effective, "dimension": dimension}
        found = list(advise(replace(USUAL, **facts)))
        assert len({each.about for each in found}) == len(found)
        assert {"method", "temperature"} <= {each.about for each in found}
        sets = [text for each in found for text in each.overrides]
        recipe = validate(Recipe, read_recipe_tree(find_recipe("digits-ink", "train"), sets), "advised")
        assert recipe.method.name == found[0].choice.split()[0]
    assert tree["method"]["name"] != "dpok"
    assert not next(iter(advise(replace(USUAL, method="adjoint-matching")))).overrides  # its own settings stay


def test_the_numbers_of_base_samples_are_those_of_the_tilt() -> None:
    """Rewards N(0, s^2): the KL of the tilt is s^2 / (2 beta^2) and the share of samples exp(-s^2 / beta^2)."""
    rewards = 0.7 * torch.special.ndtri(torch.linspace(0, 1, 20_002, dtype=torch.float64)[1:-1])
    found = numbers([rewards], 1.0)
    assert found["spread"] == pytest.approx(0.7, rel=0.01)
    assert found["kl"] == pytest.approx(0.245, rel=0.02)
    assert found["effective"] / found["count"] == pytest.approx(math.exp(-0.49), rel=0.02)
    assert found["reachable"] == 1.0
    strong = numbers([rewards], 0.2)["reachable"]
    assert numbers([rewards], strong)["effective"] == pytest.approx(REACHABLE * 20_000, rel=0.01)
    assert strong == pytest.approx(0.7 / math.sqrt(math.log(1 / REACHABLE)), rel=0.1)


def test_advice_on_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_recipe(tmp_path, method={"name": "dpok", "beta": 0.5}, training={"max_train_steps": 4, "train_batch_size": 16})
    result = CliRunner().invoke(app, ["advise", str(path)])
    assert result.exit_code == 0, result.output
    assert "method  tilt-matching" in result.output  # of 64 numbers, and its tilt is weak
    assert "On mixture in 64 dimensions" in " ".join(result.output.split())
    assert "docs/scoreboard.md" in result.output
    assert "tiltflow train" in result.output
    monkeypatch.setattr("tiltflow.runs.doctor.patient.Patient.rewards", lambda self, x: torch.ones(len(x)))
    again = CliRunner().invoke(app, ["advise", str(path)])
    assert isinstance(again.exception, InputError)
    assert "the reward is the same for all of 16 base samples" in str(again.exception)
