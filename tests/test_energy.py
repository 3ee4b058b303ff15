"""A reward that learns: its loss by hand, its optimum, and a run with it from recipe to report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_recipe
from torch import Tensor, nn

from tiltflow.errors import InputError
from tiltflow.flows.field import FunctionField
from tiltflow.pretraining.recipe import read_pretraining
from tiltflow.pretraining.run import run_pretraining
from tiltflow.rewards import LearnedReward
from tiltflow.rewards.energy import Energy, EnergyReward
from tiltflow.runs.recipe import Recipe, find_recipe, read_recipe_tree
from tiltflow.runs.run import evaluate_run, run
from tiltflow.settings import apply_overrides, read_yaml, validate
from tiltflow.streams import stream

FIELD = FunctionField(lambda x, t: x)
"""Of a model; the energy learns from its samples alone."""


class Scale(nn.Module):
    """E(x) = w mean(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x.flatten(1).mean(1, keepdim=True)


def energy(value: float, **settings: Any) -> EnergyReward:
    """Data whose pixels all have one value."""
    return EnergyReward(Energy(data="-", **settings), Scale(), torch.full((20, 1, 4, 4), value))


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """Two classes of 8 x 8 images, bright on top or below."""
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    images = rng.integers(0, 60, (64, 8, 8), dtype=np.uint8)
    images[labels == 0, :4] += 150
    images[labels == 1, 4:] += 150
    path = tmp_path / "data.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    return path


def test_the_loss_by_hand() -> None:
    """E(data) = 0.5 * 0.4, E(samples) = 0.5 * -0.2; the reward is minus the energy."""
    reward = energy(0.4, regularization=2.0)
    assert isinstance(reward, LearnedReward)
    samples = torch.full((3, 1, 4, 4), -0.2)
    assert reward(samples).tolist() == pytest.approx(3 * [0.1])
    assert reward.learn(samples, FIELD, stream(0))["reward_loss"] == pytest.approx((0.2 + 0.1) + 2 * (0.2**2 + 0.1**2))


def test_it_learns_to_prefer_data() -> None:
    """The minimiser of w (a - b) + c w^2 (a^2 + b^2) is w = -(a - b) / (2 c (a^2 + b^2))."""
    reward, samples = energy(0.4, learning_rate=0.02, num_steps=400), torch.full((8, 1, 4, 4), -0.2)
    reward.learn(samples, FIELD, stream(0))
    assert reward.network.weight.item() == pytest.approx(-0.6 / (2 * 0.2), rel=0.01)
    assert reward(reward.images).mean() > reward(samples).mean()


def test_samples_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match=r"images of shape \[1, 4, 4\] in the data, but samples of \[1, 8, 8\]"):
        energy(0.1).learn(torch.zeros(2, 1, 8, 8), FIELD, stream(0))


def few_steps(folder: Path, npz: Path, **method: Any) -> Path:
    return tiny_recipe(
        folder,
        reward={"name": "energy", "data": str(npz), "network": {"name": "residual-classifier", "channels": [8], "classes": 1}},
        method={"name": "score-as-action", "solver": "euler", "num_inference_steps": 3} | method,
        sampling={"solver": "euler", "num_inference_steps": 3},
        evaluation={"num_samples": 16, "judge": str(folder / "judge"), "data": str(npz), "grid": 4},
    )


def recipe_of(path: Path, *overrides: str) -> Recipe:
    return validate(Recipe, apply_overrides(read_yaml(path), overrides), "recipe")


def judge(folder: Path, npz: Path) -> None:
    small = ["training.max_train_steps=3", "network.image_size=8", "network.classes=2", "max_shift=0"]
    run_pretraining(read_pretraining("digits-judge", small), npz, folder / "judge", name="judge")


@pytest.mark.parametrize("method", [{"critic": {"form": "constant-skip"}}, {"name": "dxmi"}])
def test_a_run_with_a_learned_reward(tmp_path: Path, npz: Path, method: dict[str, Any]) -> None:
    judge(tmp_path, npz)
    summary = run(recipe_of(few_steps(tmp_path, npz, **method)), tmp_path / "run")
    assert summary["judge"]["frechet_base"] > 0
    assert summary["judge"]["frechet_tuned"] != summary["judge"]["frechet_base"]
    assert any("no noise" in limit or "no target law" in limit for limit in summary["limits"])
    assert summary["reaches"] == "none"
    learned = load_file(tmp_path / "run" / "reward.safetensors")
    assert learned
    again = evaluate_run(tmp_path / "run")
    assert again["reward_tuned"] == summary["reward_tuned"]  # by the energy that was learned, not a new one
    assert "Fréchet distance, tuned" in (tmp_path / "run" / "report.html").read_text()
    assert "Limits of this run" in (tmp_path / "run" / "report.html").read_text()


def test_the_policy_waits_for_the_energy_and_the_critic(tmp_path: Path, npz: Path) -> None:
    judge(tmp_path, npz)
    path = few_steps(tmp_path, npz, critic_warmup_steps=2, critic={"form": "reward-free", "num_steps": 1})
    waiting = run(recipe_of(path, "training.max_train_steps=2", "optimizer.lr_warmup_steps=0"), tmp_path / "waiting")
    assert waiting["judge"]["frechet_tuned"] == waiting["judge"]["frechet_base"]
    assert waiting["path_kl"] is None  # a sampler without noise has none
    assert waiting["reward_tuned"] == waiting["reward_base"]
    rows = [json.loads(line) for line in (tmp_path / "waiting" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["reward_loss"] != rows[1]["reward_loss"]
    assert rows[0]["critic_loss"] != rows[1]["critic_loss"]
    now = ["optimizer.lr_warmup_steps=0", "optimizer.lr_scheduler=constant"]
    moving = run(recipe_of(path, "training.max_train_steps=3", *now), tmp_path / "moving")
    assert moving["judge"]["frechet_tuned"] != moving["judge"]["frechet_base"]


def test_what_does_not_go_with_it_is_refused_before_anything_is_written(tmp_path: Path, npz: Path) -> None:
    judge(tmp_path, npz)
    path = few_steps(tmp_path, npz)
    for overrides, message in (
        (["method={name: orw-cfm-w2}"], "learns while it is used, which method 'orw-cfm-w2' cannot do"),
        (["reward.data=none.npz"], r"none\.npz: no such data set"),
        (["evaluation.data=none.npz"], r"none\.npz: no such data set"),
        (["evaluation.judge=null"], "in the features of a judge; set evaluation.judge too"),
    ):
        with pytest.raises(InputError, match=message):
            run(recipe_of(path, *overrides), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_the_cifar_recipes_run_in_small(tmp_path: Path) -> None:
    """Everything but the size: 32 x 32 colour images, a diffusion model, a judge, an energy, and 10 steps made sharper."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    short = ["training.max_train_steps=2", "training.train_batch_size=8"]
    for name, small in (
        ("cifar10-diffusion", ["network.channels=[8, 8]", "network.blocks=[1, 1]"]),
        ("cifar10-judge", ["network.channels=[4, 4]", "network.hidden=8"]),
    ):
        run_pretraining(
            read_pretraining(name, [*short, *small]), tmp_path / "cifar10.npz", tmp_path / "models" / name, name=name
        )
    both = [
        *short,
        f"model={tmp_path}/models/cifar10-diffusion",
        f"evaluation.judge={tmp_path}/models/cifar10-judge",
        "evaluation.num_samples=16",
    ]
    data = [f"reward.data={tmp_path}/cifar10.npz", f"evaluation.data={tmp_path}/cifar10.npz", "reward.network.channels=[8]"]
    tree = read_recipe_tree(find_recipe("cifar10-few-steps", "train"), [*both, *data])
    summary = run(validate(Recipe, tree, "cifar"), tmp_path / "run")
    assert summary["judge"]["frechet_tuned"] > 0

    tree = read_recipe_tree(find_recipe("cifar10-jpeg-orw", "train"), [*both, "method.regression_batch_size=4"])
    summary = run(validate(Recipe, tree, "cifar"), tmp_path / "jpeg")
    assert summary["w2_base"] > 0


def test_the_energy_can_be_another_network(npz: Path) -> None:
    other = Energy.model_validate(
        {"data": str(npz), "network": {"name": "image-critic", "image_size": [8, 8], "channels": [4]}}
    )
    assert type(other.build().network).__name__ == "ImageCriticModule"
    assert type(Energy(data=str(npz)).build().network).__name__ != "ImageCriticModule"
