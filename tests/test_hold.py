"""`hold`: the model stays, and the reward learns what it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from test_q_function import of_critics
from torch.testing import assert_close

from tiltflow.models.policy import load_policy
from tiltflow.rewards.q_function import QFunction
from tiltflow.runs.doctor import examine
from tiltflow.runs.policy_of_run import policy_of
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.settings import validate
from tiltflow.streams import stream


def test_the_policy_is_that_of_before_and_the_critics_are_not(tmp_path: Path) -> None:
    tree = of_critics(tmp_path).model_dump(mode="json", exclude_none=True)
    of_run = validate(Recipe, tree | {"method": {"name": "hold"}}, "recipe")
    summary = run(of_run, tmp_path / "run")
    before, after = (load_policy(tmp_path / name).flow.network.state_dict() for name in ("policy", "run"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert summary["reward_tuned"] == summary["reward_base"]
    played, valued = policy_of(tmp_path / "run")
    assert played.sampling.num_inference_steps == 4
    assert valued is not None
    observations, chunks = torch.randn(5, 3, generator=stream(1)), torch.randn(5, 4, generator=stream(2))
    network: Any = QFunction.model_validate(tree["reward"]).build().network
    network.load_state_dict(load_file(tmp_path / "run" / "reward.safetensors"))
    assert_close(valued.values(observations, chunks), network["target"](chunks.clamp(-1, 1), observations).mean(0))
    assert valued.discount == 0.99
    assert policy_of(tmp_path / "policy")[1] is None
    assert "reward_loss" in (tmp_path / "run" / "metrics.jsonl").read_text()
    levels = {finding.check: finding.level for finding in examine(of_run)}
    assert levels["iteration"] == "green"  # the gradient is 0, and the critics learn
