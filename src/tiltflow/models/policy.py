"""A policy: a flow of chunks of actions, given an observation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.conditions.observations import observed
from tiltflow.errors import InputError
from tiltflow.models.model import Model, read_model
from tiltflow.models.model_folder import FlowConfig, model_folder, read_config
from tiltflow.networks.policy_mlp import PolicyMlp, PolicyMlpModule
from tiltflow.samplers.sampling import Sampling
from tiltflow.user_code import check_device, whole_number


@dataclass(frozen=True)
class Policy(Model):
    """A model whose samples are chunks of actions [horizon * action], and whose conditions are observations.

    Args:
        observation_dim: numbers of an observation; the network is called as network(x, time, observations).
        horizon: actions of a chunk.
    """

    observation_dim: int = 1
    horizon: int = 1

    @property
    def prompted(self) -> bool:
        """True: there is no complete list of observations."""
        return True

    def conditions(self, items: Sequence[Item]) -> tuple[Tensor, None]:
        """Return (observations [batch, observation], None). Raises InputError for items without observations of this size."""
        return observed(items, self.observation_dim).to(self.device), None

    def example_conditions(self, count: int) -> Tensor:
        """An observation [count, observation] to try the network with: the mean of those that it was cloned on; zeros for
        another network."""
        network = self.flow.network
        if isinstance(network, PolicyMlpModule):
            return network.observations.mean.expand(count, -1)
        return torch.zeros(count, self.observation_dim, device=self.device)

    def draw(
        self,
        items: Sequence[Item],
        *,
        seed: int = 0,
        sampling: Sampling | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 256,
    ) -> Tensor:
        """Draw a chunk of actions [horizon * action] for each item; see `Model.draw`. `guidance_scale` is ignored."""
        return self.drawn(len(items), self.conditions(items)[0], seed=seed, sampling=sampling, batch_size=batch_size)

    def act(self, observations: Any, *, seed: int = 0, sampling: Sampling | None = None, batch_size: int = 256) -> Tensor:
        """Draw a chunk of actions for each of these observations [n, observation]: [n, horizon, action], on the CPU. It depends
        only on the seed, its index, its observation and `batch_size`. Actions are not clipped.

        Raises InputError for anything but observations of this size.
        """
        given = torch.as_tensor(observations, dtype=torch.float32)
        if given.ndim != 2 or given.shape[1] != self.observation_dim:
            raise InputError(f"observations must be [n, {self.observation_dim}], got {list(given.shape)}")
        seed, batch_size = whole_number(seed, "seed"), whole_number(batch_size, "batch_size", 1)
        found = self.drawn(len(given), given.to(self.device), seed=seed, sampling=sampling, batch_size=batch_size)
        return found.reshape(len(given), self.horizon, -1)

    def sample(self, num_samples: int, **options: Any) -> Tensor:
        """Raises InputError: a policy has actions for an observation alone."""
        raise InputError("a policy draws actions for observations: policy.act(observations), observations [n, observation]")


def is_policy(name_or_path: str | Path) -> bool:
    """Whether a model, by shipped name or folder, is a policy. Raises InputError if there is none."""
    config = read_config(model_folder(name_or_path))
    return isinstance(config, FlowConfig) and isinstance(config.network, PolicyMlp)


def load_policy(name_or_path: str | Path, device: torch.device | str = "cpu") -> Policy:
    """Load a policy: a model folder, or the tuned model of a run folder.

    Raises InputError if there is none, or it is another kind of model.
    """
    check_device(device)
    if not is_policy(name_or_path):
        raise InputError(f"{name_or_path}: is no policy, whose network takes observations; `tiltflow pretrain` makes one")
    model = read_model(name_or_path, device)
    network = model.network_settings
    assert isinstance(network, PolicyMlp)
    return Policy(**vars(model), observation_dim=network.observation_dim, horizon=network.horizon)
