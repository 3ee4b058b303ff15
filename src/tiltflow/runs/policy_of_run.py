"""The policy of a folder, as it is played: that of a run is sampled as the run samples it, beside its critics and its base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tiltflow.evaluation.episodes import Valued
from tiltflow.models.policy import Policy, load_policy
from tiltflow.rewards.q_function import QReward
from tiltflow.runs.run import load_run, read_run, reward_of_run
from tiltflow.runs.run_files import RECIPE


def policy_of(folder: Path, device: str = "cpu") -> tuple[Policy, Valued | None]:
    """(policy, its critics) of the folder of a model or of a run; no critics of a model, or of a run with another reward.

    Raises InputError if there is no policy, or its critics cannot be loaded.
    """
    policy = load_policy(folder, device)
    if not is_run(folder):
        return policy, None
    recipe = read_run(folder)
    policy = replace(policy, sampling=recipe.evaluation.first.sampling)
    if recipe.reward.name != "q-function":
        return policy, None
    reward = reward_of_run(recipe, folder, device)
    assert isinstance(reward, QReward)

    @torch.no_grad()
    def values(observations: Tensor, actions: Tensor) -> Tensor:
        return replace(reward, observations=observations.to(device))(actions.to(device)).cpu()

    return policy, Valued(values, reward.settings.discount)


def base_of(folder: Path, device: str = "cpu") -> Policy:
    """The policy that was tuned in a run, sampled as it is where it lies.

    Raises InputError if it cannot be had, or has changed.
    """
    base: Policy = load_run(read_run(folder), folder, device)[0]
    return base


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run, and not of a model."""
    return (folder / RECIPE).exists()
