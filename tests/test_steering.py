"""Steered samples against the laws that they are said to have, by z-tests, and what a user can get wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lines import NORMAL, TWO_MODES
from torch import Tensor, nn
from typer.testing import CliRunner

import tiltflow
from tiltflow.commands.terminal.app import app
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.laws.law import Law
from tiltflow.samplers.sampling import Sampling

ONE_STEP = Sampling(solver="euler", num_inference_steps=1)


class ByQuantiles(nn.Module):
    """The velocity by which one step of Euler's method maps standard normal noise to a law on the line."""

    def __init__(self, law: Law) -> None:
        super().__init__()
        self.law, self.scale = law, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        levels = (0.5 * (1 + torch.erf(x.double() / math.sqrt(2)))).clamp(1e-9, 1 - 1e-9)
        return (torch.from_numpy(self.law.quantiles(levels.numpy())) - x).to(x) * self.scale


def on_the_line(law: Law = NORMAL, **options: Any) -> tiltflow.Model:
    return tiltflow.Model(Flow(ByQuantiles(law)), event_shape=(1,), sampling=ONE_STEP, **options)


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x[:, 0])


def z_of_mean(values: Tensor, mean: float) -> float:
    """How many standard errors the mean of independent values is from a number."""
    return abs(values.double().mean().item() - mean) / (values.double().std().item() / math.sqrt(len(values)))


@pytest.mark.parametrize("n", [2, 4])
def test_the_best_of_n_has_its_law(n: int) -> None:
    steering = tiltflow.BestOfN(n=n)
    found = tiltflow.steer(on_the_line(TWO_MODES), tanh, steering, 4000)
    exact = steering.law(4000).exact
    assert exact is not None
    law = exact(TWO_MODES, np.tanh)
    assert torch.equal(found.rewards, tanh(found.samples).double())
    assert z_of_mean(found.rewards, law.expectation(np.tanh)) < 3.5
    assert z_of_mean((found.samples[:, 0] > 0).float(), law.positive) < 3.5
    assert z_of_mean(found.samples[:, 0] ** 2, law.expectation(np.square)) < 3.5
    assert (found.network_evaluations, found.reward_evaluations) == (4000 * n, 4000 * n)
    assert f"{law.kl(TWO_MODES):.3f}" in found.law


def test_equal_rewards_choose_nothing() -> None:
    found = tiltflow.steer(on_the_line(), lambda x: torch.zeros(len(x)), tiltflow.BestOfN(n=8), 4000)
    assert z_of_mean(found.samples[:, 0], 0.0) < 3.5
    assert z_of_mean(found.samples[:, 0] ** 2, 1.0) < 3.5


def test_each_class_is_steered_by_itself_and_a_seed_gives_the_same_samples() -> None:
    model = on_the_line(class_names=("low", "high"))

    def toward_the_class(x: Tensor, labels: Tensor) -> Tensor:
        return x[:, 0] * (2 * labels - 1)

    def draw(**options: Any) -> Any:
        return tiltflow.steer(model, toward_the_class, tiltflow.BestOfN(n=64), 50, **options)

    found = draw()
    assert found.conditions == ("low",) * 50 + ("high",) * 50
    assert found.samples[:50].max() < 0 < found.samples[50:].min()
    assert torch.equal(draw().samples, found.samples)
    assert not torch.equal(draw(seed=1).samples, found.samples)
    assert torch.equal(draw(conditions=["low"]).samples, found.samples[:50])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "digits-flow"}, "steer: model must be tiltflow.load('digits-flow'), is str"),
        ({"steering": tiltflow.BestOfN}, "such as BestOfN(n=4), is the class BestOfN"),
        ({"num_samples": 0}, "steer: num_samples must be an integer >= 1, is 0"),
        ({"guidance_scale": 2.0}, "steer: guidance_scale: only pipelines have one"),
        ({"conditions": ["a"]}, "steer: conditions: this model has none"),
        ({"reward": lambda x: x[:, 0] / 0}, "best-of-n: the reward is not finite for 8 of 8 samples"),
        ({"reward": lambda x: x}, "best-of-n: the reward must return one number per sample"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: dict[str, Any], message: str) -> None:
    given = {"model": on_the_line(), "reward": tanh, "steering": tiltflow.BestOfN(n=4), "num_samples": 2, **arguments}
    with pytest.raises(InputError) as error:
        tiltflow.steer(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_one_sample_is_no_choice() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        tiltflow.BestOfN(n=1)


def test_the_command_line_steers(tmp_path: Path) -> None:
    small = ["sample", "digits-flow", "-n", "1", "--num-inference-steps", "2", "-o", str(tmp_path / "x.npz")]
    done = CliRunner().invoke(app, [*small, "--json", "--steer", "{name: best-of-n, n: 3}", "--reward", "ink"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert (len(found["rewards"]), found["network_evaluations"], found["notes"]) == (1, 6, [])
    assert "F(r(x))^2" in found["law"]
    for wrong, message in (
        (["--steer", "best-of-n"], "--steer needs --reward too"),
        (["--reward", "ink"], "--reward needs --steer too"),
        (["--steer", "best-of", "--reward", "ink"], "there is no steering 'best-of', did you mean 'best-of-n'?"),
        (["--steer", "{name: best-of-n, n: 1}", "--reward", "ink"], "steer.n must be greater than or equal to 2 (got 1)"),
    ):
        failed = CliRunner().invoke(app, [*small, *wrong])
        assert isinstance(failed.exception, InputError)
        assert message in str(failed.exception)
