"""What only the evaluation needs is built and tried before the first step, by `tiltflow doctor` too."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import iterate, tiny_recipe
from torch import Tensor, nn

import tiltflow
from tiltflow.errors import InputError
from tiltflow.plugins import find
from tiltflow.runs.doctor import examine, verdict
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import ready, run
from tiltflow.settings import read_yaml, validate
from tiltflow.streams import stream

MINE = """
import torch

def good(x): return x.mean((1, 2, 3))
def column(x): return x.mean((1, 2, 3))[:, None]
def raises(x): raise ValueError("no face found")
def nothing_in_noise(x): return good(x).fill_(torch.nan)
def integers(x): return good(x).long()
def cut(x): return good(x.detach())
def features(x): return x.mean((2, 3))
def pictures(x): return x
def numbers(x): return x.mean((2, 3)).tolist()
def fails(x): raise KeyError("layer")
def solver(velocity, x, times): return [x for _ in times]
def refuses(velocity, x, times): raise RuntimeError("not this one")
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module `mine_of_rehearsal`."""
    (tmp_path / "mine_of_rehearsal.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine_of_rehearsal", raising=False)


def function(name: str) -> dict[str, str]:
    return {"name": "function", "path": f"mine_of_rehearsal:{name}"}


def assert_refused(recipe: Callable[[], Any], train: Callable[[Any, Path], Any], folder: Path, message: str) -> None:
    """By training, with nothing written, and by the doctor, in the same words of one line."""
    with pytest.raises(InputError) as caught:
        train(recipe(), folder)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not folder.exists()
    try:
        read = recipe()
    except InputError:
        return  # the doctor says so too: tests/test_doctor.py
    findings = list(examine(read))
    assert verdict(findings) == "red"
    assert any(message in finding.text for finding in findings if finding.level == "red")


IMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "a solver": ({"sampling": {"solver": "eular"}}, "sampling.solver: there is no solver 'eular', did you mean 'euler'?"),
    "a solver of the user": (
        {"sampling": {"solver": "mine_of_rehearsal:refuses"}},
        "the solver raised RuntimeError: not this one (in refuses, line 15 of",
    ),
    "its states": ({"sampling": {"solver": "mine_of_rehearsal:solver"}}, "returns one tensor for several times"),
    "a reward": ({"reward": function("column")}, "one number per sample, shape [2], got [2, 1]"),
    "no gradient": ({"reward": function("cut")}, "the reward has no gradient"),
    "a judge of other images": ({"evaluation": {"judge": "digits-judge", "data": "DATA"}}, "evaluation.judge does not take"),
    "data without a judge": ({"evaluation": {"data": "DATA"}}, "set evaluation.judge too"),
    "data that are not there": ({"evaluation": {"judge": "digits-judge", "data": "none.npz"}}, "none.npz"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_models(name: str, tmp_path: Path) -> None:
    changes, message = copy.deepcopy(IMAGES[name])
    if changes.get("evaluation", {}).get("data") == "DATA":
        np.savez(tmp_path / "data.npz", x_test=np.zeros((4, 3, 8, 8), dtype=np.uint8), x_train=np.zeros((4, 3, 8, 8), np.uint8))
        changes["evaluation"]["data"] = str(tmp_path / "data.npz")
    path = tiny_recipe(tmp_path, **changes)
    assert_refused(lambda: validate(Recipe, read_yaml(path), "recipe"), run, tmp_path / "run", message)


POINT = {"num_inference_steps": 2}
PICTURES: dict[str, tuple[dict[str, Any], str]] = {
    "a solver": ({"points": [POINT | {"solver": "eular"}]}, "evaluation.points.0.solver: there is no solver 'eular'"),
    "a second solver": (
        {"points": [POINT, POINT | {"solver": "mine_of_rehearsal:refuses"}]},
        "evaluation.points[1]: the solver raised RuntimeError: not this one (in refuses",
    ),
    "more steps than there are": (
        {"points": [POINT, {"num_inference_steps": 1001}]},
        "evaluation.points[1]: num_inference_steps 1001",
    ),
    "a held-out reward of the wrong shape": (
        {"rewards": [function("good"), function("column")]},
        "evaluation.rewards function 3: the reward must return one number per sample, shape [2], got [2, 1]",
    ),
    "a held-out reward that raises": (
        {"rewards": [function("raises")]},
        "evaluation.rewards function 2: the reward raised ValueError: no face found (in raises, line 6 of",
    ),
    "a held-out reward of integers": ({"rewards": [function("integers")]}, "must return floats, got int64"),
    "features of the wrong shape": (
        {"features": "mine_of_rehearsal:pictures"},
        "evaluation.features must return [batch, width]",
    ),
    "features that are no tensor": ({"features": "mine_of_rehearsal:numbers"}, "must return a tensor [batch, width], got list"),
    "features that fail": ({"features": "mine_of_rehearsal:fails"}, "evaluation.features raised KeyError: 'layer' (in fails"),
    "no reference": ({"features": "mine_of_rehearsal:features", "reference": "nowhere"}, "nowhere"),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    from tiny_pipelines import tiny_pipeline

    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline("stable-diffusion", folder).save_pretrained(folder / "pipe")
    return folder / "pipe"


def tree_for(pipeline: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"diffusers": str(pipeline), "height": 16, "width": 16, "adapter": {"rank": 2}},
        "prompts": {"texts": ["a red cat", "a blue dog"], "validation": 0.5},
        "reward": function("good"),
        "method": {"name": "adjoint-matching", "num_inference_steps": 3},
        "training": {"max_train_steps": 1, "prompts_per_step": 1, "num_generations": 2},
        "evaluation": {"num_prompts": 1, "num_generations": 2, "points": [POINT]},
    } | changes


def refused(tree: dict[str, Any], folder: Path, message: str) -> None:
    assert_refused(lambda: validate(Recipe, tree, "recipe"), run, folder, message)


@pytest.mark.parametrize("name", PICTURES)
def test_pipelines(name: str, pipeline: Path, tmp_path: Path) -> None:
    changes, message = PICTURES[name]
    refused(tree_for(pipeline, evaluation=tree_for(pipeline)["evaluation"] | changes), tmp_path / "run", message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": {"name": "adjoint-matching", "num_inference_steps": 1001}},
            "method: num_inference_steps 1001: DDIMScheduler refuses it",
        ),
        ({"reward": function("raises")}, "the reward raised ValueError: no face found (in raises, line 6 of"),
        ({"reward": function("cut")}, "the reward has no gradient"),
    ],
)
def test_what_the_training_needs(changes: dict[str, Any], message: str, pipeline: Path, tmp_path: Path) -> None:
    refused(tree_for(pipeline, **changes), tmp_path / "run", message)


def test_reference_pictures_of_another_size_that_the_features_do_not_take(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for i in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / "real" / f"{i}.png")
    (tmp_path / "mine_of_rehearsal.py").write_text(MINE + "def flat(x): return x[:, :, :16].reshape(len(x), 768)\n")
    changes = {"features": "mine_of_rehearsal:flat", "reference": str(tmp_path / "real")}
    tree = tree_for(pipeline, evaluation=tree_for(pipeline)["evaluation"] | changes)
    refused(tree, tmp_path / "run", "evaluation.features raised RuntimeError: shape '[2, 768]' is invalid")


def test_a_reward_that_sees_nothing_in_rough_pictures_may_start(pipeline: Path) -> None:
    """A detector finds nothing in what is drawn in few steps; the first batch decides."""
    ready(validate(Recipe, tree_for(pipeline, reward=function("nothing_in_noise")), "recipe"), "cpu")


# ---- batches that teach nothing ----


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, -0.2, 0.1], [0.1, 0.4, -0.3]]))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([x, t[:, None]], 1) @ self.weight.T


ALONE: list[tuple[dict[str, Any], str | None]] = [
    ({"name": "orw-cfm-w2"}, "that of a single sample is always 1; give 2 or more"),
    ({"name": "orw-cfm-w2", "weight_mode": "both-terms"}, "that of a single sample is always 1"),
    ({"name": "orw-cfm-w2", "weight_mode": "raw"}, None),
    ({"name": "score-as-action", "estimator": "return"}, "the advantage of a single sample is always 0"),
    ({"name": "score-as-action", "preset": "ddpo"}, "the advantage of a single sample is always 0"),
    ({"name": "score-as-action"}, None),
    ({"name": "adjoint-matching"}, None),
]


@pytest.mark.parametrize(("method", "message"), ALONE)
def test_one_sample_to_compare(method: dict[str, Any], message: str | None, pipeline: Path, tmp_path: Path) -> None:
    """The gradient of one sample does not depend on its reward, for just those that are refused."""
    path = tiny_recipe(tmp_path, method=method, training={"train_batch_size": 1}, reward="ink")
    tree = tree_for(pipeline, method=method)
    tree["training"] |= {"prompts_per_step": 4, "num_generations": 1}
    recipes: list[tuple[str, Callable[[], Any]]] = [
        ("train_batch_size", lambda: validate(Recipe, read_yaml(path), "recipe")),
        ("num_generations", lambda: validate(Recipe, tree, "recipe")),
    ]
    for name, read in recipes:
        if message is None:
            read()
        else:
            with pytest.raises(InputError, match=f"training.{name} 1 teaches nothing: .*{message}"):
                read()

    settings = validate(type(find("methods", method["name"])(**{k: v for k, v in method.items() if k != "name"})), method, "m")
    settings = settings.model_copy(
        update={"num_inference_steps": 3, "min_effective_sample_size": 1.0, "critic_warmup_steps": 0}
    )
    model = tiltflow.Model(tiltflow.Flow(Linear()), (2,))
    one = tiltflow.Training(train_batch_size=1, max_train_steps=1)
    if message is not None:
        with pytest.raises(InputError, match=r"training\.train_batch_size 1 teaches nothing"):
            tiltflow.tune(model, lambda x: x.sum(1), settings, one)
    gradients = []
    for scale in (1.0, 3.0):
        tuned, base = (tiltflow.Flow(Linear().requires_grad_(trained)) for trained in (True, False))
        state = settings.new_state((2,), 0, torch.device("cpu"))
        if method["name"] == "score-as-action":
            state.value.fitted = True  # not by the only reward
        x = torch.randn(1, 2, generator=stream(0, "x"))
        steps = iterate(settings, tuned, base, lambda x, s=scale: s * x.sin().sum(1), x, stream(0, "r"), state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            next(iter(steps))
        gradients.append(torch.cat([p.grad.flatten() for p in tuned.parameters() if p.grad is not None]))
    assert torch.equal(*gradients) == (message is not None)
