"""Every kind of model can do what any other can: two toy kinds, networks on tensors, and pipelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import ATOMS, SPACE, VARIANCE, Ragged, Video, projected
from safetensors.torch import load_file
from torch import Tensor

import tiltflow
from tiltflow.conditions.prompts import Prompt
from tiltflow.evaluation.monitor import read_looks
from tiltflow.models.protocol import GenerativeModel
from tiltflow.runs.run_folder import read_records

BETA = 0.5
SLOPE = torch.linspace(-1, 1, ATOMS * SPACE).reshape(ATOMS, SPACE)
FAST = tiltflow.Optimizer(learning_rate=3e-2, lr_warmup_steps=0, max_grad_norm=None)
METHODS: dict[str, tuple[Any, dict[str, int]]] = {
    "adjoint-matching": (
        tiltflow.AdjointMatching(beta=BETA, num_inference_steps=20),
        {"max_train_steps": 100, "train_batch_size": 8},
    ),
    "score-as-action": (
        tiltflow.ScoreAsAction(beta=BETA, estimator="return", num_inference_steps=20),
        {"max_train_steps": 150, "train_batch_size": 512},
    ),
    "orw-cfm-w2": (
        tiltflow.OrwCfmW2(tau=1.0, alpha=BETA, weight_mode="both-terms", num_inference_steps=10),
        {"max_train_steps": 250, "train_batch_size": 4096},
    ),
}


def along(x: Tensor) -> Tensor:
    return (x * SLOPE).flatten(1).sum(1)


@pytest.mark.parametrize(
    "name", ["adjoint-matching", *(pytest.param(each, marks=pytest.mark.slow) for each in list(METHODS)[1:])]
)
def test_ragged_clouds_reach_the_tilt_of_their_size(name: str) -> None:
    """N(0, s^2 P) tilted by exp(a x / beta) is N(s^2 P a / beta, s^2 P): of each size, in the range of P alone."""
    method, training = METHODS[name]
    tuned = tiltflow.tune(Ragged.make(), along, method, tiltflow.Training(**training), optimizer=FAST)
    for label, size in enumerate((2, 3)):
        mask = (torch.arange(ATOMS) < size).float()[None, :, None]
        items = [Prompt("", {"label": label})] * 4000
        x = tuned.draw(items, seed=1, batch_size=4000)
        torch.testing.assert_close(projected(x, mask.expand(4000, -1, -1)), x, rtol=0, atol=1e-5)
        expected = VARIANCE / BETA * projected(SLOPE[None], mask)[0]
        free = (size - 1) * SPACE
        assert (x.mean(0) - expected).abs().max() < 4 * (VARIANCE / 4000) ** 0.5 + 0.02
        # a variance of n k normal numbers has the relative error sqrt(2 / (n k)); the chain of 60 steps adds 2 %
        variance = (x - x.mean(0)).square().sum() / (4000 * free)
        assert abs(variance / VARIANCE - 1) < 4 * (2 / (4000 * free)) ** 0.5 + 0.03


def loud(videos: Tensor) -> Tensor:
    return videos.mean((1, 2, 3, 4))


KINDS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "ragged": (Ragged.make, along, {"train_batch_size": 16}, {"num_samples": 32}),
    "video": (
        Video.make,
        loud,
        {"prompts_per_step": 2, "num_generations": 4, "guidance_mode": "rollout"},
        {"num_prompts": 2, "num_generations": 4},
    ),
}
SHORT: dict[str, Any] = {
    "adjoint-matching": tiltflow.AdjointMatching(num_inference_steps=4),
    "score-as-action": tiltflow.ScoreAsAction(preset="ddpo", num_inference_steps=4),
    "orw-cfm-w2": tiltflow.OrwCfmW2(num_inference_steps=4, min_effective_sample_size=1, num_passes=1),
}


def tuned_into(folder: Path, kind: str, method: str, **settings: Any) -> Any:
    make, reward, sizes, measured = KINDS[kind]
    training = tiltflow.Training(**{**sizes, "max_train_steps": 4, "monitor": {"steps": 2, "num_samples": 16}} | settings)
    conditions = ["a wave", "a flame"] if make().prompted else None
    evaluation = tiltflow.Evaluation(
        **measured, points=[{"num_inference_steps": 4}, {"solver": "memoryless", "num_inference_steps": 4}]
    )
    return tiltflow.tune(
        make(), reward, SHORT[method], training, optimizer=FAST, conditions=conditions, evaluation=evaluation, output=folder
    )


@pytest.mark.parametrize("method", SHORT)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_ones_own_goes_through_everything(kind: str, method: str, tmp_path: Path) -> None:
    """The loop, micro-batches, the average, the monitor, checkpoints, resume bit for bit, the evaluation and its report."""
    assert isinstance(KINDS[kind][0](), GenerativeModel)
    whole = tuned_into(tmp_path / "whole", kind, method, ema_decay=0.5, micro_batch_size=4)
    tuned_into(tmp_path / "parts", kind, method, ema_decay=0.5, micro_batch_size=4, max_train_steps=4, checkpointing_steps=2)
    for later in (tmp_path / "parts" / "checkpoints").glob("step-*4"):
        (later / "manifest.json").unlink()  # as if it had been cut off
    settings = {"ema_decay": 0.5, "micro_batch_size": 4, "checkpointing_steps": 2, "resume_from_checkpoint": "latest"}
    tuned_into(tmp_path / "parts", kind, method, **settings)
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(torch.equal(first[key], value) for key, value in whole.flow.network.state_dict().items())
    assert [look["step"] for look in read_looks(tmp_path / "whole")] == [0, 2, 4]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert [row["model"] for row in summary["table"]] == ["base", "tuned"] * 2
    assert summary["path_kl"] > 0
    assert (tmp_path / "whole" / "report.html").exists()
    assert len(read_records(tmp_path / "parts")) == 4
