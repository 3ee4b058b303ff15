"""Policy gradients whose advantages compare the samples of a group, of one condition or of the batch: no critic."""

# Mutation tests: test_group_policies.py

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from tiltflow.control.timesteps import Stratum, choose_timesteps
from tiltflow.laws.target import Reach, Target, exponential_tilt
from tiltflow.methods.policies.policy_gradient import (
    Actions,
    Form,
    PolicyGradient,
    Positive,
    Trajectories,
    among_others,
    clipped,
)
from tiltflow.rewards import NonFiniteRewards, Reward
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import Trajectory
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs

PER_STEP = (
    "Each step pays for its own KL alone, as published: the law is the tilt to first order in 1 / beta, and milder beyond."
)
STANDARDISED = (
    "Advantages are divided by the standard deviation of the reward: beta is in units of that, which falls as the model moves,"
    " so the temperature in units of reward is not chosen."
)


class GroupPolicy(PolicyGradient):
    """Part of the settings of the policy gradients that have no critic."""

    form: Form = "importance-sampling"
    """importance-sampling: PPO's clipped ratio, for any number of passes. score-function: REINFORCE, for one pass."""
    clip_range: Positive = 1e-4
    """For importance-sampling: limit on |ratio - 1| of a step. The ratio is of the whole sample; code that takes the mean of
    its logarithm over D dimensions has another, about D times as wide."""

    @model_validator(mode="after")
    def _check_policy(self) -> Self:
        if not (self.sampling.has_noise and self.sampling.is_chain):
            raise ValueError(f"solver {self.solver!r} has no steps with noise and a density; use memoryless or ddpm")
        if self.form == "score-function" and self.num_passes > 1:
            raise ValueError(
                "form 'score-function' is right before the first update alone; use num_passes 1 or importance-sampling"
            )
        return self

    @property
    def needs(self) -> Needs:
        """Takes any reward."""
        return Needs(
            passes=self.num_passes,
            exact_trajectories="method.form 'importance-sampling'" if self.form == "importance-sampling" else None,
            trajectory_copies=2 + self._priced,
        )

    @property
    def _standardize(self) -> bool:
        """True if advantages are in units of the standard deviation of their group."""
        return True

    @property
    def _pull(self) -> float:
        """What an advantage weighs beside a nat of path KL."""
        return 1 / self.beta

    @property
    def _strata(self) -> tuple[Stratum, ...] | None:
        """The steps that enter the loss."""
        return self.train_timesteps

    def learns_nothing(self, group: int) -> str | None:
        """See `MethodSettings`: a single sample has no others to be better than."""
        if group > 1:
            return None
        return "the samples of a prompt, a class or a batch are compared, and the advantage of a single one is always 0"

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        """Nothing is kept between iterations."""

    def gradients(self, batch: Batch, state: Any) -> Iterator[dict[str, float]]:
        """One iteration: yields once for each of `num_passes` optimizer steps, its gradient accumulated. Trajectories are drawn
        from `batch.tuned` itself; where samples alone are guided, the gradient is taken through the conditional velocity.

        Raises InputError if the ratio is not 1 before the first update (a network that samples and trains differently).
        """
        size, generator = len(batch), batch.generator
        with torch.no_grad():
            drawn, batch = self._draw(batch, _nothing)
            advantages = self._advantages(drawn, batch.tuned.groups(len(batch), drawn.end.device))
        measured = self._measured(drawn, size - len(batch))
        steps, total = len(drawn.path.velocities), self.num_inference_steps
        for i in range(self.num_passes):
            pairs = choose_timesteps(self._strata, steps, total, len(batch), generator).to(drawn.end.device)
            loss_of = partial(self._loss, drawn=drawn, advantages=advantages, first=i == 0)
            loss, step_kl = self._improve(batch, drawn, pairs, loss_of)
            yield {**measured, "loss": loss, "step_kl": step_kl}

    def _advantages(self, drawn: Trajectories, members: list[Tensor]) -> Tensor:
        """Advantages [steps, own]."""
        experience = drawn.experience
        found = among_others(experience.rewards, members, standardize=self._standardize)
        return found[experience.own].expand(len(experience.costs), -1)

    def _loss(self, actions: Actions, *, drawn: Trajectories, advantages: Tensor, first: bool) -> Tensor:
        """The loss [pairs]."""
        some, of_base = advantages[actions.k, actions.i], drawn.base_velocities
        if self.form == "score-function":
            gain = actions.score_function(some, first=first)
        else:
            ratios = actions.log_ratios(first=first)
            gain = clipped(ratios, some, torch.full_like(ratios, self.clip_range))
        return -gain * self._pull + (0 if of_base is None else actions.price(of_base))


class PricedPolicy(GroupPolicy):
    """Part of the settings of those that pay for the path KL."""

    kl_gradient: Literal["per-step", "whole"] = "per-step"
    """per-step, as published: each step pays for its own KL, and not for that of the steps to which it leads. whole: the
    gradient of the path KL."""

    @property
    def _own_temperature(self) -> bool:
        """True if beta is the temperature, in units of reward."""
        return not self._standardize

    def _limits(self, start: Start) -> list[str]:
        """Reasons why the sampler cannot be tilted as it should be."""
        return self.sampling.limits(start)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """p_base exp(r / beta), as far as the gradient of the price, the sampler and the units of the advantages reach it."""
        caveats = self._limits(start)
        exact = not caveats and self._own_temperature
        if self.kl_gradient == "per-step":
            caveats.append(PER_STEP)
        if self._standardize:
            caveats.append(STANDARDISED)
        reaches: Reach = "none" if not exact else "first-order" if self.kl_gradient == "per-step" else "exact"
        return exponential_tilt(self.beta, caveats, reaches=reaches)

    def priced_chain(self, start: Start = 0.0) -> tuple[Chain, Tensor] | None:
        """The chain of the policy and the energy of a change of its velocities, 0 for a last step that the base takes."""
        chain = self._chain(start)
        return chain, torch.where(chain.std > 0, self._energy(chain), 0.0)

    def _chain(self, start: Start) -> Chain:
        return self.sampling.chain(start)

    def _advantages(self, drawn: Trajectories, members: list[Tensor]) -> Tensor:
        """Those of the reward, less beta times the KL of later steps."""
        of_reward = super()._advantages(drawn, members)
        if self.kl_gradient == "per-step":
            return of_reward
        costs, own = drawn.experience.costs, drawn.experience.own
        later = costs.flip(0).cumsum(0).flip(0) - costs
        return of_reward - torch.stack([among_others(row, members, standardize=False) for row in later])[:, own]


def _nothing(path: Trajectory, reward: Reward, non_finite: NonFiniteRewards) -> Tensor:
    """No part of the values of the states is known, [steps, own]."""
    return torch.zeros(len(path.velocities), path.states.data.shape[1], device=path.states.data.device)
