r"""The value of actions, Q(s, a), by critics that learn from transitions while a method trains the policy.

A chunk a of h actions at s is worth its discounted rewards, and what the policy makes of the observation s' after them
(2601.14234, section 4; chunks: 2507.07969):

    Q_j(s, a)  <-  sum_i gamma^i r_i + gamma^h (mean_k Q'_k(s', a') - rho std_k Q'_k(s', a')),      a' ~ policy(. | s').

Q' are targets, exponential averages of the critics' weights; rho is the pessimism; a' is drawn by the tuned policy's ODE and
clipped to [-1, 1]; with `best_of` it is the best of several. With `distance_price` what comes after a chunk loses that times
|a' - b'|^2, b' the actions that the data has at s' (ReBRAC, 2305.09836). Where the task is over, nothing is added. The reward
of a chunk is the mean of Q'.
"""

# Mutation tests: test_q_function.py

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from tiltflow.errors import InputError
from tiltflow.flows.field import VelocityField, Which
from tiltflow.networks.critic_ensemble import CriticEnsemble
from tiltflow.optimization import adamw, gradient_norm, load_optimizer
from tiltflow.policies.environments import Environment
from tiltflow.policies.replay import Replay
from tiltflow.policies.transitions import Transitions, load_transitions
from tiltflow.rewards import Metadata
from tiltflow.rewards.functions.online import Online
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import PathOrName, Settings
from tiltflow.streams import new_network, normal

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class QFunction(Settings):
    """The value of a chunk of actions at an observation, learned along the way from the rewards of a data set."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = True
    unit: ClassVar[str] = "return"

    name: Literal["q-function"] = "q-function"
    data: PathOrName
    """An .npz file of transitions with rewards and masks."""
    horizon: Count = 5
    """Actions of a chunk, as the policy has them."""
    members: Annotated[int, Field(ge=2)] = 10
    """Critics of the ensemble."""
    hidden: Count = 512
    """Width of their hidden layers."""
    layers: Count = 4
    """Number of their hidden layers."""
    discount: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """What a reward counts one step later."""
    pessimism: Annotated[float, Field(ge=0)] = 0.5
    """rho: standard deviations among the critics that are taken off the value of what comes after a chunk."""
    distance_price: Annotated[float, Field(ge=0)] = 0.0
    """Price of the squared distance of the next actions from those of the data, that is taken off the value of what comes after
    a chunk: as ReBRAC's critics have it."""
    target_decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    """Decay of the exponential averages of weights, whose values are aimed at, and are the reward."""
    learning_rate: Positive = 3e-4
    """Learning rate of its own Adam."""
    train_batch_size: Count = 256
    """Transitions of a step."""
    num_steps: Count = 1
    """Optimizer steps for each batch of the method."""
    max_grad_norm: Positive | None = 1.0
    """Norm to which the gradient of the critics is clipped; null for none."""
    num_inference_steps: Count = 10
    """Steps of Euler's method, by which the next actions are drawn."""
    best_of: Count = 1
    """Next actions are the best of so many that are drawn, by the mean of Q': the value of the policy that chooses so."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the networks' first weights."""
    online: Online | None = None
    """Episodes that the policy plays while it is trained, and that are added to the transitions; none by default: offline."""

    @cached_property
    def sampling(self) -> Sampling:
        """How the next actions are drawn."""
        return Sampling(solver="euler", num_inference_steps=self.num_inference_steps)

    @property
    def description(self) -> str:
        return "the return of a chunk of actions, by critics that are learned along the way; higher is better"

    def build(self, device: torch.device | str = "cpu") -> QReward:
        """Raises InputError if the data cannot be read, have no rewards, or no episode as long as a chunk."""
        data = load_transitions(self.data, rewards=True)
        replay = Replay(data.to(device), self.horizon)
        settings = CriticEnsemble(
            observation_dim=data.observations.shape[1],
            actions=self.horizon * data.actions.shape[1],
            members=self.members,
            hidden=self.hidden,
            layers=self.layers,
        )
        online, target = new_network(settings, self.seed), new_network(settings, self.seed)
        for network in (online, target):
            network.observations.fit(data.observations[replay.starts.cpu()])  # type: ignore[union-attr, operator]
        network = nn.ModuleDict({"online": online, "target": target.requires_grad_(False)}).to(device)
        optimizer = adamw(network["online"].parameters(), lr=self.learning_rate, weight_decay=0.0)
        sizes = data.observations.shape[1], data.actions.shape[1]
        return QReward(self, network, optimizer, replay, None if self.online is None else self.online.make(*sizes))


@dataclass(frozen=True)
class QReward:
    """See `tiltflow.rewards.LearnedReward`; bound to the observations of samples by `given`.

    Args:
        network: the critics, `online`, and their `target`.
        replay: the transitions, to which those of episodes are added.
        environment: where these are played.
        observations: of the samples [batch, observation]; None before it is bound.
    """

    settings: QFunction
    network: nn.Module
    optimizer: torch.optim.Optimizer
    replay: Replay
    environment: Environment | None = None
    observations: Tensor | None = None

    @property
    def transitions(self) -> Transitions:
        """All transitions."""
        return self.replay.transitions

    @property
    def starts(self) -> Tensor:
        """The rows at which chunks begin."""
        return self.replay.starts

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> QReward:
        """The reward of samples at these observations. Raises InputError for others than the critics see."""
        found = [more["observation"] for more in metadata or () if "observation" in more]
        size = self.transitions.observations.shape[1]
        if len(found) < len(prompts) or any(len(each) != size for each in found):
            raise InputError(f"reward q-function: values actions at observations of {size} numbers, conditions of a policy")
        seen = torch.from_numpy(np.array(found, np.float32).reshape(-1, size))
        return replace(self, observations=seen.to(self.starts.device))

    def select(self, which: Which) -> QReward:
        """The reward of these samples of the batch."""
        return self if self.observations is None else replace(self, observations=self.observations[which])

    def __call__(self, x: Tensor) -> Tensor:
        """The mean of the target critics' values of chunks x [batch, horizon * action], clipped to [-1, 1]: [batch]."""
        if self.observations is None:
            raise InputError("reward q-function: is bound to no observations; it is for the actions of a policy")
        size = self.settings.horizon * self.transitions.actions.shape[1]
        if x.shape[1:] != (size,):
            chunks = f"chunks of {self.settings.horizon} actions of {self.transitions.actions.shape[1]} numbers"
            raise InputError(f"reward q-function: samples of shape {list(x.shape[1:])}, but {chunks} in its data")
        return self._values("target", x.clamp(-1, 1), self.observations).mean(0)

    def _values(self, which: str, x: Tensor, observations: Tensor) -> Tensor:
        values: Tensor = self.network[which](x, observations)  # type: ignore[index]
        return values

    def state_dict(self) -> dict[str, Any]:
        """The state of the critics, of their targets and of the optimizer, and the episodes that were played."""
        own = {"replay": self.replay.state_dict()} if self.settings.online else {}
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.network.load_state_dict(state["network"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.settings.online:
            self.replay.load_state_dict(state["replay"])

    def learn(self, x: Tensor, policy: VelocityField, generator: torch.Generator) -> dict[str, float]:
        """Take optimizer steps on transitions. Returns the loss before them, `reward_loss`, and of an episode that was played
        `episode_return` and `episode_over`.

        Args:
            x: ignored: the critics learn from the data alone.
            policy: the tuned policy, which draws the next actions.
        """
        losses = [self._step(policy, generator) for _ in range(self.settings.num_steps)]
        return {"reward_loss": losses[0], **self._played(policy)}

    def _played(self, policy: VelocityField) -> dict[str, float]:
        """Play an episode if it is time for one, and add it to the transitions. Returns the sum of its rewards, and 1 if its
        last step ended the task, 0 if its time was over."""
        online, replay, device = self.settings.online, self.replay, self.starts.device
        if online is None or self.environment is None:
            return {}
        replay.updates += 1
        if replay.updates % online.every:
            return {}

        def act(observations: Tensor, generator: torch.Generator) -> Tensor:
            return self.choose(policy, observations.to(device), generator)[0]

        size = self.transitions.actions.shape[1]
        episode = online.play(self.environment, act, replay.updates // online.every, size, device)
        replay.add(episode)
        assert episode.rewards is not None
        assert episode.masks is not None
        return {"episode_return": float(episode.rewards.sum()), "episode_over": 1 - float(episode.masks[-2])}

    def _step(self, policy: VelocityField, generator: torch.Generator) -> float:
        settings, data = self.settings, self.transitions
        which = torch.randint(len(self.starts), (settings.train_batch_size,), generator=generator, device=generator.device)
        rows = self.starts[which]
        targets = self.targets(rows, policy, generator)
        values = self._values("online", data.chunks(rows, settings.horizon), data.observations[rows])
        loss = (values - targets).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        parameters = self.optimizer.param_groups[0]["params"]
        gradient_norm(parameters, settings.max_grad_norm, 0)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._parameters("target"), self._parameters("online"), 1 - settings.target_decay)
        return loss.item()

    def _parameters(self, which: str) -> list[Tensor]:
        return list(self.network[which].parameters())  # type: ignore[index]

    @torch.no_grad()
    def targets(self, rows: Tensor, policy: VelocityField, generator: torch.Generator) -> Tensor:
        """What the values of the chunks that begin at these rows are to become, [batch]."""
        settings, data = self.settings, self.transitions
        rewards, weights = data.returns(rows, settings.horizon, settings.discount)
        after = data.observations[rows + settings.horizon]
        actions, values = self.choose(policy, after, generator)
        value = values.mean(0) - settings.pessimism * values.std(0, correction=0)
        if settings.distance_price:
            value = value - settings.distance_price * data.squared_distance(rows + settings.horizon, actions)
        return rewards + weights * value

    @torch.no_grad()
    def choose(self, policy: VelocityField, observations: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Actions of the policy at observations [n, observation], the best of `best_of`: [n, horizon * action] in [-1, 1], and
        their values by the target critics [members, n]."""
        settings, n = self.settings, len(observations)
        seen = observations.repeat_interleave(settings.best_of, 0)
        x = normal((len(seen), settings.horizon * self.transitions.actions.shape[1]), generator)
        actions = sample(policy.bind(seen), x, settings.sampling, generator).clamp(-1, 1)
        values = self._values("target", actions, seen).unflatten(1, (n, -1))
        best, rows = values.mean(0).argmax(1), torch.arange(n, device=actions.device)
        return actions.unflatten(0, (n, -1))[rows, best], values[:, rows, best]
