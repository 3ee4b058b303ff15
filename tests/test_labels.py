"""Class-conditional models: labels follow their samples, and each class is tuned to its own tilt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import tiltflow
from tiltflow.commands.terminal.app import app
from tiltflow.conditions.labels import as_labels, draw_labels
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.networks.unet import Unet
from tiltflow.rewards.functions.checked import evaluate
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.rewards.functions.prompted import given
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import evaluate_run, run
from tiltflow.runs.run_files import write_yaml
from tiltflow.streams import new_network, stream

NAMES = ("low", "high")
MEANS, VARIANCES, SLOPES = torch.tensor([-2.0, 1.2]), torch.tensor([0.25, 0.16]), torch.tensor([0.9, -0.7])
BETA = 0.5
SHIFTS = VARIANCES * SLOPES / BETA
"""The tilt of N(m, s^2) by exp(slope x / beta) is N(m + s^2 slope / beta, s^2)."""


class TwoGaussians(nn.Module):
    """The exact field of N(m_c + shift_c, s_c^2) for class c; the shifts are what is learned, 0 at the start.

    With A(t) = (t s^2 - (1 - t)) / (t^2 s^2 + (1 - t)^2), the field of N(m, s^2) is m + A (x - t m).
    """

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        assert labels.dtype == torch.int64
        assert labels.shape == x.shape[:1]
        mean, variance = MEANS[labels] + self.shift[labels], VARIANCES[labels]
        slope = (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)
        return (mean + slope * (x[:, 0] - t * mean))[:, None]


def along_slope(x: Tensor, labels: Tensor) -> Tensor:
    return SLOPES[labels] * x[:, 0]


def two_gaussians() -> tiltflow.Model:
    return tiltflow.Model(Flow(TwoGaussians()), (1,), tiltflow.Sampling(num_inference_steps=60), class_names=NAMES)


METHODS: dict[str, tuple[Any, tiltflow.Optimizer, dict[str, int]]] = {
    "adjoint-matching": (
        tiltflow.AdjointMatching(beta=BETA, num_inference_steps=20),
        tiltflow.Optimizer(learning_rate=3e-2, lr_warmup_steps=0, max_grad_norm=None),
        {"max_train_steps": 100, "train_batch_size": 4},
    ),
    "score-as-action": (
        tiltflow.ScoreAsAction(beta=BETA, estimator="return", num_inference_steps=30),
        tiltflow.Optimizer(learning_rate=3e-2, lr_warmup_steps=0),
        {"max_train_steps": 200, "train_batch_size": 1024},
    ),
    "orw-cfm-w2": (
        # which settles at p exp(tau r / alpha) exactly, for a Gaussian and a linear reward
        tiltflow.OrwCfmW2(tau=1.0, alpha=0.5, weight_mode="both-terms", num_inference_steps=20),
        tiltflow.Optimizer(learning_rate=2e-2, lr_warmup_steps=0),
        {"max_train_steps": 320, "train_batch_size": 8192},
    ),
}


@pytest.mark.parametrize(
    "name", ["adjoint-matching", *(pytest.param(name, marks=pytest.mark.slow) for name in ("score-as-action", "orw-cfm-w2"))]
)
def test_each_class_reaches_its_own_tilt(name: str) -> None:
    method, optimizer, training = METHODS[name]
    tuned = tiltflow.tune(two_gaussians(), along_slope, method, tiltflow.Training(**training), optimizer=optimizer)
    for label, (mean, variance) in enumerate(zip(MEANS + SHIFTS, VARIANCES, strict=True)):
        x = tuned.sample(4000, labels=label, seed=1)[:, 0]
        assert abs(x.mean() - mean) < 4 * variance.sqrt() / 4000**0.5
        assert abs(x.var() / variance - 1) < 4 * (2 / 4000) ** 0.5 + 0.03  # the chain of 60 steps adds 2 %


@pytest.mark.parametrize("name", METHODS)
def test_each_class_moves_toward_its_own_tilt(name: str) -> None:
    """Up for one, down for the other, whatever is done to the batch on the way."""
    method, optimizer, _ = METHODS[name]
    training = tiltflow.Training(max_train_steps=16, train_batch_size=64, micro_batch_size=24, ema_decay=0.5)
    network: Any = tiltflow.tune(two_gaussians(), along_slope, method, training, optimizer=optimizer).flow.network
    assert 0.1 < network.shift[0] / SHIFTS[0] < 2
    assert 0.1 < network.shift[1] / SHIFTS[1] < 2
    one = tiltflow.Training(max_train_steps=16, train_batch_size=64, classes=(1,))
    network = tiltflow.tune(two_gaussians(), along_slope, method, one, optimizer=optimizer).flow.network
    assert network.shift[0] == 0
    assert 0.1 < network.shift[1] / SHIFTS[1] < 2


# ---- labels ----


def test_labels_are_numbers_names_or_one_for_each() -> None:
    assert as_labels(None, 5, NAMES).tolist() == [0, 1, 0, 1, 0]
    for label in (1, "high", "1", [1], ["high"], torch.tensor(1).reshape(1)):
        assert as_labels(label, 3, NAMES).tolist() == [1, 1, 1]
    assert as_labels(["high", 0], 2, NAMES).tolist() == [1, 0]
    assert as_labels(torch.tensor([1, 0]), 2, NAMES).dtype == torch.int64
    for wrong, message in (
        ("hihg", "there is no class 'hihg', did you mean 'high'"),
        (2, r"a class is a number from 0 to 1, or its name, got 2"),
        (True, "got True"),
        (torch.tensor([0.5]), r"got 0\.5"),
        ([0, 1], "one for each of 3 samples, got 2"),
    ):
        with pytest.raises(InputError, match=message):
            as_labels(wrong, 3, NAMES)


def test_a_batch_has_as_many_of_each_class() -> None:
    counts = torch.zeros(3)
    for step in range(60):
        labels = draw_labels((0, 4, 7), 8, stream(0, "start", step))
        count = torch.tensor([int((labels == label).sum()) for label in (0, 4, 7)])
        assert sorted(count.tolist()) == [2, 3, 3]
        counts += count
    assert (counts / counts.sum() - 1 / 3).abs().max() < 0.02  # the odd one out is another each time


def test_samples_are_of_their_labels() -> None:
    model = two_gaussians()
    x = model.sample(600, labels=[0] * 300 + [1] * 300, batch_size=250)  # parts that labels must be cut into too
    assert abs(x[:300].mean() - MEANS[0]) < 0.2
    assert abs(x[300:].mean() - MEANS[1]) < 0.2
    assert torch.equal(model.sample(6, batch_size=4)[:4], model.sample(4, batch_size=4))
    assert torch.equal(model.sample(4), model.sample(4, labels=[0, 1, 0, 1]))
    assert torch.equal(model.sample(4)[::2], model.sample(4, labels="low")[::2])
    with pytest.raises(InputError, match="this model is not class-conditional; leave them out"):
        tiltflow.Model(Flow(lambda x, t: -x), (1,)).sample(2, labels=0)


def test_rewards_are_told_labels_names_and_metadata() -> None:
    model, seen = two_gaussians(), []

    def score(x: Tensor, metadata: Any, prompts: Any, labels: Tensor) -> Tensor:
        seen.extend(zip(labels.tolist(), prompts, [more["label"] for more in metadata], strict=True))
        return x[:, 0]

    training = tiltflow.Training(max_train_steps=1, train_batch_size=4)
    tiltflow.tune(model, score, METHODS["adjoint-matching"][0], training)
    assert set(seen) == {(0, "low", 0), (1, "high", 1)}
    with pytest.raises(
        InputError, match="the reward asks for labels, and there are 0 for 3 samples: this model has no prompts and no classes"
    ):
        evaluate(from_function(along_slope), torch.zeros(3, 1))
    with pytest.raises(InputError, match="the reward asks for labels, which are those of a class-conditional model"):
        evaluate(given(from_function(along_slope), ["a cat"] * 3), torch.zeros(3, 1))


@pytest.mark.parametrize(
    ("method", "training", "message"),
    [
        ({}, {"classes": [0, 2]}, "training.classes names class 2, the model has 0 to 1"),
        ({"estimator": "return"}, {"train_batch_size": 3}, "training.train_batch_size 3, 1 of each class, teaches nothing: "),
        ({}, {"calibration_samples": 8}, "training.calibration_samples: there is one working temperature"),
        ({"estimator": "closed-form"}, {}, "method.estimator 'closed-form' needs a critic that knows the class"),
        ({"estimator": "temporal-difference"}, {}, "method.estimator 'temporal-difference' needs a critic"),
    ],
)
def test_what_does_not_fit_is_one_line(method: dict[str, Any], training: dict[str, Any], message: str) -> None:
    of_method: Any = tiltflow.ScoreAsAction(num_inference_steps=4, **method)
    settings = tiltflow.Training(**{"max_train_steps": 1, "train_batch_size": 4} | training)
    with pytest.raises(InputError, match=message):
        tiltflow.tune(two_gaussians(), along_slope, of_method, settings)


def test_classes_of_an_unconditional_model_and_data_of_no_class(tmp_path: Path) -> None:
    base = tiltflow.Model(Flow(nn.Linear(1, 1)), (1,))
    with pytest.raises(InputError, match=r"training\.classes: this model is not class-conditional"):
        tiltflow.tune(base, lambda x: x[:, 0], METHODS["adjoint-matching"][0], tiltflow.Training(classes=(0,)))
    method = tiltflow.OrwCfmW2(data=str(tmp_path), online_fraction=0.5)
    with pytest.raises(InputError, match=r"method\.data: the images would have to be of the classes"):
        tiltflow.tune(two_gaussians(), along_slope, method)


def test_one_class_needs_no_critic_that_knows_it() -> None:
    method = tiltflow.ScoreAsAction(num_inference_steps=4, estimator="closed-form")
    training = tiltflow.Training(max_train_steps=1, train_batch_size=4, classes=(1,))
    tiltflow.tune(two_gaussians(), along_slope, method, training)


# ---- what a run says ----

FUNCTION = {"name": "function", "path": "test_labels:along_slope"}


def evaluated(folder: Path, shift: Tensor, patch: pytest.MonkeyPatch, **evaluation: Any) -> dict[str, Any]:
    """The summary of a run whose tuned model has these shifts."""

    def load(path: Any, device: Any) -> tiltflow.Model:
        model = two_gaussians()
        if Path(path).name == "model":
            with torch.no_grad():
                model.flow.network.shift.copy_(shift)  # type: ignore[attr-defined]
        return model

    patch.setattr("tiltflow.models.sources.network.load", load)
    recipe = Recipe.model_validate(
        {
            "model": "exact",
            "reward": FUNCTION,
            "method": {"name": "adjoint-matching", "beta": BETA},
            "sampling": {"num_inference_steps": 60},
            "evaluation": {"num_samples": 4001} | evaluation,
        }
    )
    folder.mkdir()
    (folder / "model").mkdir()
    write_yaml(folder / "recipe.yaml", recipe.model_dump(mode="json"))
    (folder / "metrics.jsonl").write_text('{"step": 9, "seconds": 1.0, "network_evaluations": 1}\n')
    return evaluate_run(folder)


def test_the_evaluation_knows_the_target_of_each_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over the classes of E[slope (m + shift)], where one law for all would lean to the class of the higher partition;
    an exact model is not told from it, and one whose classes are off in opposite directions is."""
    right = evaluated(tmp_path / "right", SHIFTS, monkeypatch)
    expected = (SLOPES * (MEANS + SHIFTS)).mean().item()
    assert right["num_samples"] == 4000
    assert abs(right["reward_target"] - expected) < 4 * right["reward_target_error"] < 0.1
    partition = torch.softmax(SLOPES * MEANS / BETA + (SLOPES / BETA) ** 2 * VARIANCES / 2, 0)
    pooled = (partition * SLOPES * (MEANS + SHIFTS)).sum().item()
    assert abs(right["reward_target"] - pooled) > 10 * right["reward_target_error"]
    assert {f"mean reward of class {name}" for name in NAMES} <= {row["statistic"] for row in right["tests"]}
    assert right["verdict"]["tone"] == "good", right["verdict"]
    # KL of a tilted Gaussian: slope^2 s^2 / (2 beta^2), the mean over classes
    divergence = ((SLOPES / BETA) ** 2 * VARIANCES / 2).mean().item()
    assert abs(right["path_kl_target"] - divergence) < 4 * right["path_kl_target_error"]
    assert abs(right["path_kl"] - divergence) < 0.1 * divergence

    # the mean reward stays where it should be: 0.9 a - 0.7 b = 0
    off = evaluated(tmp_path / "off", SHIFTS + torch.tensor([0.14, 0.18]), monkeypatch)
    rejected = {row["statistic"] for row in off["tests"] if row["rejected"]}
    assert {f"mean reward of class {name}" for name in NAMES} <= rejected
    assert "mean reward" not in rejected


def test_a_target_of_classes_that_few_samples_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = evaluated(tmp_path / "few", SHIFTS, monkeypatch, num_samples=40)
    assert "No verdict" in few["verdict"]["text"]
    assert few["reward_target"] is None


def test_a_recipe_trains_a_class_conditional_model(tmp_path: Path) -> None:
    class_model().save(tmp_path / "m")
    tree = {
        "model": str(tmp_path / "m"),
        "reward": FUNCTION | {"path": "test_labels:bright_by_class"},
        "method": {"name": "adjoint-matching", "num_inference_steps": 4, "beta": 0.1},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"max_train_steps": 3, "train_batch_size": 6, "classes": [0, 2], "monitor": {"steps": 2, "num_samples": 9}},
        "sampling": {"num_inference_steps": 4},
        "evaluation": {"num_samples": 33, "batch_size": 8},
    }
    summary = run(Recipe.model_validate(tree), tmp_path / "run")
    assert summary["num_samples"] == 32
    with Image.open(tmp_path / "run" / "before.png") as picture:  # a column for each class
        assert picture.height == pytest.approx(16 / 2 * picture.width, rel=0.1)
    tuned = tiltflow.load(tmp_path / "run")
    assert isinstance(tuned, tiltflow.Model)
    assert tuned.class_names == ("a", "b", "c")
    base = class_model()
    brighter = [(tuned.sample(16, labels=i) - base.sample(16, labels=i)).mean().item() for i in (0, 2)]
    assert brighter[0] > 0 > brighter[1]
    result = CliRunner().invoke(app, ["doctor", str(tmp_path / "run" / "recipe.yaml"), "--device", "cpu"])
    assert result.exit_code == 0, result.output


def bright_by_class(images: Tensor, labels: Tensor) -> Tensor:
    """Up for class 0, down for the others."""
    return images.mean((1, 2, 3)) * torch.where(labels == 0, 1.0, -1.0)


# ---- on disk ----

UNET = Unet(channels=(8, 8), blocks=(1, 1), embedding=8, num_classes=3)


def class_model(seed: int = 0) -> tiltflow.Model:
    network = new_network(UNET, seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=stream(seed, "more")))
    return tiltflow.Model(Flow(network), (1, 8, 8), tiltflow.Sampling(num_inference_steps=4), UNET, ("a", "b", "c"))


def test_a_saved_model_is_the_same_and_knows_its_classes(tmp_path: Path) -> None:
    model = class_model()
    model.save(tmp_path / "m")
    loaded = tiltflow.load(tmp_path / "m")
    assert isinstance(loaded, tiltflow.Model)
    assert loaded.class_names == ("a", "b", "c")
    assert torch.equal(loaded.sample(6), model.sample(6))
    assert not torch.allclose(loaded.sample(3, labels="a"), loaded.sample(3, labels="b"), atol=1e-3)


def test_labels_on_the_command_line(tmp_path: Path) -> None:
    model = class_model()
    model.save(tmp_path / "m")
    command = ["sample", str(tmp_path / "m"), "-n", "4", "-o", str(tmp_path / "x.npz"), "--label"]
    result = CliRunner().invoke(app, [*command, "b", "--label", "0"])
    assert result.exit_code == 0, result.output
    with np.load(tmp_path / "x.npz") as archive:
        assert torch.equal(torch.from_numpy(archive["samples"]), model.sample(4, labels=[1, 0, 1, 0]))
    for label, message in (("bb", "there is no class 'bb'"), ("7", "a class is a number from 0 to 2")):
        result = CliRunner().invoke(app, [*command, label])
        assert isinstance(result.exception, InputError)
        assert message in str(result.exception)
    result = CliRunner().invoke(app, ["sample", "digits-flow", "-o", str(tmp_path / "x.npz"), "--label", "0"])
    assert isinstance(result.exception, InputError)
    assert "this model is not class-conditional" in str(result.exception)
