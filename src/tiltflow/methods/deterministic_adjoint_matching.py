r"""Deterministic Adjoint Matching: control of the sampler's ODE by its adjoint (arXiv 2605.06583; value-gradient guidance,
arXiv 2512.05116, states the same problem).

Without noise, x' = v_base + u, a reward can be followed at the price of the transport, E[ r(x_1) ] - beta / 2 integral |u|^2.
The optimal control is minus the adjoint, so

    loss = E sum_k h_k | v_tuned(x_k, t_k) - v_base(x_k, t_k) + a_{k+1} |^2,
    a_K = -grad r(x_K) / beta,      a_k = (1 + h_k J_base(x_k, t_k))^T a_{k+1},

along paths of Euler's method, held fixed. One iteration is

    1.  solve the tuned ODE, without gradients
    2.  run the adjoint back along it: vector-Jacobian products of the base
    3.  regress the velocities on it.

`vgg-flow` predicts the gradient of the value in place of carrying it back.

It is fast and has no noise but that of the batch. **The law is no tilt of the base**: it is what the best transport map makes
of it. On N(m, S) under a reward of curvature -q its variance is S / (1 + q G / beta)^2 with G = pi sqrt(S) / 2, where the tilt
has S / (1 + q S / beta); under a linear reward it goes pi / (2 sqrt(S)) times as far. A map moves modes, and no mass between
them.
"""

# Mutation tests: test_deterministic_adjoint_matching.py

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.flows.interpolant import expand
from tiltflow.flows.linearize import linearize
from tiltflow.laws.adjoint_laws import deterministic_control
from tiltflow.laws.law import Law
from tiltflow.laws.target import RewardAt, Target, exponential_tilt
from tiltflow.methods import Tilting
from tiltflow.rewards.functions.checked import finite_only, value_and_gradient
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import Trajectory
from tiltflow.samplers.sampling import Sampling
from tiltflow.samplers.stored import Stored
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs


class DeterministicAdjointMatching(Tilting):
    """Deterministic Adjoint Matching. Needs a differentiable reward; aims at the best transport of the samples, not at a tilt
    of the base."""

    name: Literal["deterministic-adjoint-matching"] = "deterministic-adjoint-matching"
    num_inference_steps: Annotated[int, Field(ge=2)] = 20
    """Steps of Euler's method, from noise to data."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, more steps are near the noise; see `time_grid`."""
    control_from: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Control the steps from this time on alone, and need no adjoint before it; the others learn to stay as they are. 0.9 of 20
    steps is the published truncation to the last two."""

    @model_validator(mode="before")
    @classmethod
    def _is_apart(cls, values: Any) -> Any:
        if isinstance(values, dict) and {"preset", "value_gradient"} & values.keys():
            raise ValueError("value gradients that are predicted are the method 'vgg-flow' now, with value_network: false")
        return values

    @property
    def sampling(self) -> Sampling:
        """The sampler that is controlled."""
        return Sampling(solver="euler", num_inference_steps=self.num_inference_steps, shift=self.shift)

    @property
    def needs(self) -> Needs:
        """The gradient of the reward, and memory for the adjoints."""
        return Needs(reward_gradient=True, trajectory_copies=2)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """The law of the best transport. Raises InputError if no step is controlled."""
        self._first_controlled(self.sampling.chain(start))
        caveat = (
            "The control of an ODE is a transport of the samples: their law is no tilt of the base at any temperature. It is"
            " narrower or further off than the tilt, and modes that are apart keep their weights."
        )
        return replace(
            exponential_tilt(self.beta, [caveat], reaches="none"),
            words="the transport with the most E r - beta / 2 (its energy)",
            temperature=None,
            exact=self._exact_law,
        )

    def _exact_law(self, base: Law, reward: RewardAt) -> Law:
        """The law of the best transport."""
        return deterministic_control(base, reward, self.beta, self.control_from)

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        """No state is kept."""

    def gradients(self, batch: Batch, state: None) -> Iterator[dict[str, float]]:
        """One iteration of the algorithm: one optimizer step, its gradient accumulated."""
        chain, count = self.sampling.chain(batch.start), len(batch)
        path = batch.own_paths(chain, to_the_end=True)
        states, targets = path.states, path.velocities  # whose place they take

        def aim(some: Batch, part: slice) -> tuple[Tensor]:
            own = path.moved(lambda values: values.of(batch.own_part(part)))
            return (self._aim(some, own),)

        (rewards,) = batch.map(aim)
        if (kept := finite_only(rewards)) is not None:
            rewards = rewards[kept]
        batch.own_finite(targets, "velocity that is aimed at", chain.times)
        tuned, counted = batch.tuned.select(batch.own), batch.counted(kept)
        step, which = torch.meshgrid(torch.arange(len(targets)), torch.arange(len(counted)), indexing="ij")
        step, which = (each.flatten().to(batch.x.device) for each in (step, which))

        def terms_of(part: Tensor) -> dict[str, Tensor]:
            k, i = step[part], which[part]
            x = states.at(k, i)
            t, h = (c.to(x.device)[k] for c in (chain.times, chain.v_scale))
            misfit = tuned.select(i)(x, t) - targets.at(k, i)
            return {"loss": (expand(h, x) * misfit.square()).flatten(1).sum(1)}

        yield {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            **({} if kept is None else {"dropped": float(count - len(kept))}),
            **batch.accumulate_own(terms_of, counted[which], over=len(rewards)),
        }

    def _first_controlled(self, chain: Chain) -> int:
        """The first step at or after `control_from`. Raises InputError if there is none."""
        late = int(torch.searchsorted(chain.times[:-1], self.control_from - 1e-9))
        if late == len(chain):
            raise InputError(f"method.control_from {self.control_from:g}: the last step is at t = {chain.times[-2].item():.3g}")
        return late

    def _aim(self, batch: Batch, path: Trajectory) -> Tensor:
        """Write into the velocities of a path what they are to be. Returns the rewards of the ends [batch]."""
        chain, states, targets = path.chain, path.states, path.velocities
        rewards, gradient = value_and_gradient(batch.reward, states[-1], batch.non_finite)
        a, first = -gradient / self.beta, self._first_controlled(chain)
        for k in range(len(chain) - 1, first - 1, -1):
            v, pullback = linearize(batch.base, states[k], chain.times[k])
            targets[k] = v - a
            if k > first:
                a = a + pullback(chain.v_scale[k].item() * a)
        self._leave(batch, chain, states, targets, first)
        return rewards

    @torch.no_grad()
    def _leave(self, batch: Batch, chain: Chain, states: Stored, targets: Stored, first: int) -> None:
        """Write into `targets` that the steps before `first` stay as they are."""
        for k in range(first):
            targets[k] = batch.base(states[k], chain.times[k])
