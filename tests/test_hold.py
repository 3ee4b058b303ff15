"""`hold`: the model stays, and the reward learns what it makes."""

from __future__ import annotations

from pathlib import Path

import torch
from test_q_function import of_critics

from tiltflow.models.policy import load_policy
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.settings import validate


def test_the_policy_is_that_of_before_and_the_critics_are_not(tmp_path: Path) -> None:
    tree = of_critics(tmp_path).model_dump(mode="json", exclude_none=True)
    summary = run(validate(Recipe, tree | {"method": {"name": "hold"}}, "recipe"), tmp_path / "run")
    before, after = (load_policy(tmp_path / name).flow.network.state_dict() for name in ("policy", "run"))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert summary["reward_tuned"] == summary["reward_base"]
    assert "reward_loss" in (tmp_path / "run" / "metrics.jsonl").read_text()
