"""`tiltflow verify --steer`: each kind of steering beside the law that it has, and the tilt."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError
from tiltflow.problems.verification.steering import read_steered, verify_steering


def found(problem: str, steering: str, *overrides: str) -> dict[str, Any]:
    return verify_steering(read_steered(problem, steering, ["num_samples=2000", "num_inference_steps=20", *overrides])).values


def test_the_best_of_n_is_at_its_own_law_and_not_at_the_tilt() -> None:
    values = found("two-modes", "best-of-n", "n=8", "solver=heun")
    assert values["distance_own"] < values["floor"] + 3 * values["floor_std"]
    assert values["distance"] > 4 * values["floor"]
    assert values["reward"] > values["reward_exact"] + 0.2
    assert (values["network_evaluations"], values["reward_evaluations"]) == (
        8 * 2000 * 39,
        8 * 2000,
    )  # Heun's, the last step once
    assert values["temperature"] == 1


@pytest.mark.parametrize(
    ("problem", "steering", "overrides"),
    [
        ("two-modes", "importance-resampling", ["beta=0.5"]),
        ("gaussian", "smc", ["num_inference_steps=100", "num_samples=8000"]),
        (
            "gaussian",
            "{name: gradient-guidance, curvature: 3, std: 0.5}",
            ["quadratic=3", "solver=heun", "num_inference_steps=80"],
        ),
    ],
)
def test_what_aims_at_the_tilt_is_near_it(problem: str, steering: str, overrides: list[str]) -> None:
    values = found(problem, steering, *overrides)
    assert values["temperature"] == (0.5 if "beta=0.5" in overrides else 1)
    effective = min(values["effective_sample_size"], values["num_samples"])  # of particles fewer than of samples
    worth = (values["num_samples"] / effective) ** 0.5
    assert values["distance"] < worth * (values["floor"] + 3 * values["floor_std"]) + 0.01
    assert values["distance_base"] > 4 * values["distance"]


def test_what_does_not_fit_is_one_line() -> None:
    for problem, steering, overrides, said in (
        ("lqg", "smc", [], "steering is measured on gaussian, mixture and two-modes"),
        ("gaussian", "best-of-m", [], "there is no steering 'best-of-m', did you mean 'best-of-n'"),
        ("gaussian", "best-of-n", ["m=3"], "'m' is not a setting"),
        ("gaussian", "smc", ["solver=heun"], "solver heun has no noise"),
    ):
        with pytest.raises(InputError, match=said):
            found(problem, steering, *overrides)


def test_the_command() -> None:
    words = ["verify", "gaussian", "--steer", "best-of-n", "--set", "num_samples=200", "--seed", "3", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert (values["steering"], values["problem"], values["seed"]) == ("best-of-n", "gaussian", 3)
    assert values["distance_own"] is None
    refused = CliRunner().invoke(app, ["verify", "gaussian", "--steer", "smc", "--method", "ram"])
    assert isinstance(refused.exception, InputError)
    assert "--method is for training, and --steer draws without" in str(refused.exception)
