r"""DxMI: a sampler that is tuned through each of its steps by a value function (diffusion by maximum-entropy inverse
reinforcement learning, arXiv 2407.00626).

The reward is minus an energy that learns to tell samples from data while the sampler learns from it (reward `energy`); any
differentiable reward will do. One iteration is

    1.  roll the sampler out
    2.  the reward learns, if it does; the critic V takes steps of temporal differences, V(t_k, x_k) <- V(t_{k+1}, x_{k+1})
    3.  the sampler ascends, each step by itself, with the state before it and its noise held fixed,

            E sum_k V(t_{k+1}, x_{k+1}) - step_price / 2 |x_{k+1} - x_k|^2 / m_k,

        V the reward after the last step, m_k an average of |x_{k+1} - x_k|^2 over iterations.

Nothing holds the model near the base. Other than published: the noise of the steps is the sampler's own and is not learned, so
that there is no price on its entropy; V knows the time; its targets are those of the trajectories, not of fresh samples.
"""

# Mutation tests: test_dxmi.py

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.control.timesteps import choose_timesteps
from tiltflow.control.value import Critic, Value, improve
from tiltflow.errors import InputError
from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.methods import Positive
from tiltflow.methods.policies.policy_gradient import NO_LAW, Actions, PolicyGradient, Trajectories, known_values
from tiltflow.optimization import load_optimizer
from tiltflow.rewards import LearnedReward
from tiltflow.samplers.grid import Start
from tiltflow.samplers.sampling import SolverName
from tiltflow.samplers.stored import Stored
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs

Count = Annotated[int, Field(ge=1)]
KEPT = 0.99
"""Of the average length of a step, from one iteration to the next."""


@dataclass
class State:
    """The critic and its optimizer, and m_k, the mean square of each step."""

    value: Value
    optimizer: torch.optim.Optimizer
    iterations: int = 0
    squares: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        numbers = {"iterations": self.iterations, "squares": self.squares}
        return {"value": self.value.state_dict(), "optimizer": self.optimizer.state_dict(), **numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.value.load_state_dict(state["value"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.iterations, self.squares = state["iterations"], list(state["squares"])


class Dxmi(PolicyGradient):
    """DxMI. Needs a differentiable reward, which may learn; raises its mean, and aims at no law."""

    name: Literal["dxmi"] = "dxmi"
    beta: Positive = 1.0
    """Changes nothing of the training: the temperature of the tilted law that reports put beside the run."""
    solver: SolverName = "ddpm"
    """Any solver that is a chain, with or without noise."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 10
    """Steps of the sampler that is tuned, from noise to data."""
    step_price: Annotated[float, Field(ge=0)] = 0.01
    """Price of the length of a step, in units of reward: half of it for a step as long as they have been."""
    critic: Critic = Critic(loss="td")
    """Value function."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the start in which the sampler stays as it is, and only the critic learns, with the reward if that learns
    too."""

    @model_validator(mode="after")
    def _check_chain(self) -> Self:
        if not self.sampling.is_chain:
            raise ValueError(f"solver {self.solver!r} is no chain of Gaussian steps, through which the gradient goes; use ddpm")
        return self

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published learning rate, of CIFAR-10 in ten steps."""
        return {"learning_rate": 1e-7}

    @property
    def needs(self) -> Needs:
        """The gradient of a reward that may learn, and a critic that is right."""
        return Needs(
            reward_gradient=True,
            learned_reward=True,
            critic_of_condition="method dxmi",
            without_critic="score-as-action with estimator return-minus-value",
            passes=self.num_passes,
            warmup_steps=self.critic_warmup_steps,
            trajectory_copies=3,
        )

    @property
    def temperature(self) -> None:
        """It has none."""
        return None

    def at_temperature(self, beta: float) -> Self:
        """Raises InputError."""
        raise InputError("Dxmi has no temperature")

    @property
    def _priced(self) -> bool:
        return False

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """No law."""
        return exponential_tilt(self.beta, [NO_LAW], reaches="none")

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> State:
        """The state that is kept between iterations. Raises InputError for a critic that does not fit; see `Critic.build`."""
        value = self.critic.build(event_shape, seed, device)
        return State(value, torch.optim.Adam(value.network.parameters(), lr=self.critic.learning_rate))

    def gradients(self, batch: Batch, state: State) -> Iterator[dict[str, float]]:
        """One iteration: yields once for each of `num_passes` optimizer steps, its gradient accumulated. Trajectories are drawn
        from `batch.tuned` itself."""
        size, generator = len(batch), batch.generator
        with torch.no_grad():
            drawn, batch = self._draw(batch, partial(known_values, state.value))
            if not isinstance(batch.reward, LearnedReward):  # its first values tell nothing of the scale of later ones
                state.value.fit_scale(drawn.rewards)
        warm = state.iterations >= self.critic_warmup_steps
        state.iterations += 1
        measured = self._measured(drawn, size - len(batch))
        measured["critic_loss"] = improve(
            state.value, state.optimizer, drawn.experience, self.critic, generator, state.iterations
        )
        measured |= batch.learn(drawn.end)
        if not warm:
            yield {**measured, "loss": 0.0, "step_kl": 0.0}
            return
        pull = self._pulls(batch, state, drawn)

        def loss_of(actions: Actions) -> Tensor:
            return -(actions.v * pull.at(actions.k, actions.i)).flatten(1).sum(1)

        for _ in range(self.num_passes):
            pairs = choose_timesteps(
                self.train_timesteps, len(drawn.path.velocities), self.num_inference_steps, len(batch), generator
            ).to(drawn.end.device)
            loss, step_kl = self._improve(batch, drawn, pairs, loss_of)
            yield {**measured, "loss": loss, "step_kl": step_kl}

    def _pulls(self, batch: Batch, state: State, drawn: Trajectories) -> Stored:
        """The gradient of what a step ascends in its velocity, [steps, own, *event]."""
        path, chain = drawn.path, drawn.path.chain
        found = batch.storage.new(len(path.velocities), batch.x[batch.own])
        mean_squares = batch.together(
            torch.stack([(path.states[k + 1] - path.states[k]).flatten(1).square().sum(1) for k in range(len(found))])
        ).mean(1)
        now = [float(each) for each in mean_squares]
        before = state.squares or now
        state.squares = [KEPT * old + (1 - KEPT) * new for old, new in zip(before, now, strict=True)]
        for k in range(len(found)):
            if k == len(found) - 1:
                slope = self._at_the_end(batch, path)
            else:
                slope = self._value_gradient(batch, state.value, path.states[k + 1], chain.times[k + 1])
            away = path.states[k + 1] - path.states[k]
            found[k] = chain.v_scale[k].item() * (slope - self.step_price / max(state.squares[k], 1e-30) * away)
        batch.own_finite(found, "gradient of the value", chain.times)
        return found
