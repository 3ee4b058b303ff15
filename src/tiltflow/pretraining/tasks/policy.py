"""Pretraining of a policy from the transitions of a data set: behaviour cloning by flow matching."""

# Mutation tests: test_policy.py

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import Linear, interior
from tiltflow.models.policy import Policy
from tiltflow.networks.policy_mlp import PolicyMlp, PolicyMlpModule
from tiltflow.policies.transitions import Transitions, load_transitions
from tiltflow.pretraining.images import batches
from tiltflow.pretraining.loop import Stage
from tiltflow.pretraining.recipe import Pretraining, Scores
from tiltflow.pretraining.regression import point_and_target
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import new_network, stream

Count = Annotated[int, Field(ge=1)]
HELD_OUT, MOST = 10, 20_000
"""One of so many episodes is held out, if there are as many; and the most chunks of these that the score is of."""


class PolicyPretraining(Pretraining):
    """Regress the velocity of chunks of actions, given the observation before them, at a uniform time of the linear path."""

    task: Literal["policy"] = "policy"
    horizon: Count = 5
    """Actions of a chunk, drawn together and taken one after the other."""
    hidden: Count = 512
    """Width of the network's hidden layers."""
    layers: Count = 4
    """Number of its hidden layers."""
    sampling: Sampling = Sampling(solver="euler", num_inference_steps=10)
    """Solver and grid of the saved policy where nothing else is asked for."""

    def prepare(self, path: Path, device: str) -> PolicyTask:
        data = load_transitions(path)
        train, held_out = split(data, self.horizon)
        settings = PolicyMlp(
            observation_dim=data.observations.shape[1],
            action_dim=data.actions.shape[1],
            horizon=self.horizon,
            hidden=self.hidden,
            layers=self.layers,
        )
        network = new_network(settings, self.seed)
        assert isinstance(network, PolicyMlpModule)
        network.observations.fit(data.observations[train])
        return PolicyTask(self, settings, network.to(device), data.to(device), train.to(device), held_out.to(device))


RECIPE = PolicyPretraining


def split(data: Transitions, horizon: int) -> tuple[Tensor, Tensor]:
    """The rows at which chunks begin, of the episodes to train on and of those held out; none of these where there are less
    than `HELD_OUT` episodes. Raises InputError if no episode is as long as a chunk."""
    starts = data.starts(horizon)
    episode = data.last.unique(return_inverse=True)[1][starts]
    out = episode % HELD_OUT == HELD_OUT - 1
    return starts[~out], starts[out]


@dataclass(frozen=True)
class PolicyTask:
    """A network, the transitions, and the rows at which chunks begin."""

    recipe: PolicyPretraining
    settings: PolicyMlp
    network: nn.Module
    transitions: Transitions
    train: Tensor
    held_out: Tensor

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {self.settings.name: self.network}

    @property
    def model(self) -> Policy:
        """The network as a policy that can be sampled and saved."""
        settings = self.settings
        return Policy(
            Flow(self.network),
            settings.event_shape,
            self.recipe.sampling,
            settings,
            observation_dim=settings.observation_dim,
            horizon=settings.horizon,
        )

    def data(self) -> str:
        rows = self.transitions.last
        return f"{len(rows):,} rows of {len(rows.unique()):,} episodes, {len(self.train):,} chunks to train on"

    def remarks(self) -> list[str]:
        return [f"`held_out_loss` is the training's loss on chunks of every {HELD_OUT}th episode, which is not trained on."]

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Squared error of the velocity for the chunks that begin at these rows: the mean over their numbers, [batch]."""
        x1 = self.transitions.chunks(rows, self.recipe.horizon)
        s = interior(torch.rand(len(x1), generator=generator, device=x1.device))
        x0 = torch.randn(x1.shape, generator=generator, device=x1.device)
        x, target = point_and_target(Linear()(s), "velocity", x0, x1)
        predicted = self.network(x, s, self.transitions.observations[rows])
        return F.mse_loss(predicted, target, reduction="none").mean(1)

    def stages(self) -> Iterator[Stage]:
        recipe = self.recipe
        generator = stream(recipe.seed, "noise", device=self.train.device)
        order = batches(len(self.train), recipe.training.train_batch_size, stream(recipe.seed, "order"))
        yield Stage(
            "training",
            (self.network,),
            recipe.training,
            lambda: self.loss(self.train[next(order).to(self.train.device)], generator).mean(),
        )

    def save(self, folder: Path, card: str) -> None:
        self.model.save(folder, card)

    @torch.no_grad()
    def scores(self) -> Scores:
        here = PolicyTask(self.recipe, self.settings, self.network, self.transitions.to("cpu"), self.train, self.held_out.cpu())
        every = max(1, len(here.held_out) // MOST)
        rows, generator = here.held_out[::every], stream(self.recipe.seed, "scores")
        if not len(rows):
            return {}
        return {"held_out_loss": torch.cat([here.loss(part, generator) for part in rows.split(1024)]).mean().item()}
