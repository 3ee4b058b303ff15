r"""Score as Action: continuous-time policy optimisation for any reward and any solver (Zhao et al., arXiv 2502.01819).

Sampling is a control problem: the state is (t, x), the action is the score, and the running reward is minus beta times the
path KL to the base, which Girsanov's theorem gives in closed form. Written for velocities (at given x and t the score is an
affine function of the velocity, so an action may be either), with the gain b_k, the noise s_k and the energy e_k of step k,

    J = E[ r(x_1) - sum_k cost_k ],      cost_k = beta / 2 e_k |v - v_base|^2 (x_k, t_k).

Its policy gradient is the gradient of E sum_k ( b_k v . vec_k - cost_k ) in v, with vec_k held fixed and one of

    return               eps_k (R - sum_j cost_j) / s_k                        REINFORCE on the terminal reward
    return-minus-value   eps_k (R - sum_{j>=k} cost_j - V(t_k, x_k)) / s_k
    temporal-difference  eps_k (V(t_{k+1}, x_{k+1}) - V(t_k, x_k) - cost_k) / s_k
    closed-form          grad_x V(t_k, x_k)
    pathwise             grad_x V(t_{k+1}, x_{k+1}), and grad r after the last step

eps_k being the noise of the step. The first two are exactly unbiased for the chain that is run, whatever V is; the third is
with the chain's exact V; the closed form is off by O(1 / N), has the least variance, and needs no transition densities and no
noise, so it serves ODE solvers too. pathwise is its twin after the step: as E[eps V(m + s eps)] = s E grad V, it is unbiased
with the chain's exact V, but it needs the gradient of the reward. return-minus-value is the default wherever there is noise:
a learned V is never exact, and its errors add to the variance of this one and to the bias of the others
(docs/score-as-action.md has both measured).

A running reward f(x, t) in the objective (`tiltflow.control.objective`, another thing than the setting `running_reward`, which
says how the path KL is priced) lowers cost_k by h_k f(x_k, t_k).

One iteration is

    1.  roll the policy out, without gradients, by the solver
    2.  returns, and vec_k from the critic
    3.  improve the critic on these trajectories (after 2, so that V stays a baseline that has not seen them)
    4.  improve the policy, within a trust region.

With an ODE solver there is no path KL: the energy is then that of the memoryless SDE, a transport cost, and the optimum is not
p_base exp(r / beta). And a process that remembers its start (an SDE that is not memoryless, a diffusion whose noise end
still holds signal) reaches it only up to the initial-value bias: paths can be tilted, but not the points that they start from.
"""

# Mutation tests: test_score_as_action.py

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from tiltflow.control.timesteps import choose_timesteps
from tiltflow.control.value import FORMS, Critic, Experience, Value, improve, returns
from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.methods import from_preset
from tiltflow.methods.policies.policy_gradient import (
    DDPO_OPTIMIZER,
    NO_LAW,
    Actions,
    PolicyGradient,
    Trajectories,
    among_others,
    check_velocities,
    clipped,
    known_values,
)
from tiltflow.optimization import load_optimizer
from tiltflow.rewards import LearnedReward
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import Trajectory
from tiltflow.samplers.sampling import Sampling
from tiltflow.samplers.stored import Stored
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Estimator = Literal["return", "return-minus-value", "temporal-difference", "closed-form", "pathwise"]

PRESETS: dict[str, dict[str, Any]] = {
    # what the method `ddpo` does: recipes from before it had a name of its own
    "ddpo": {
        "estimator": "return",
        "standardize": True,
        "running_reward": "none",
        "update": "clip",
        "clip_range": 1e-4,
        "clip_scaling": "none",
        "solver": "ddpm",
        "num_inference_steps": 50,
    },
}
OPTIMIZERS: dict[str, dict[str, Any]] = {"ddpo": DDPO_OPTIMIZER}
"""The optimizer of the presets that have published one."""


@dataclass
class State:
    """The critic and its optimizer, and the penalty of the trust region, in units of beta."""

    value: Value
    optimizer: torch.optim.Optimizer | None = None
    penalty: float = 1.0
    step_kl: float = 0.0
    iterations: int = 0

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        return {
            "value": self.value.state_dict(),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "penalty": self.penalty,
            "step_kl": self.step_kl,
            "iterations": self.iterations,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.value.load_state_dict(state["value"])
        if self.optimizer is not None:
            load_optimizer(self.optimizer, state["optimizer"])
        self.penalty, self.step_kl, self.iterations = (state[key] for key in ("penalty", "step_kl", "iterations"))


@dataclass(frozen=True)
class Vectors:
    """What the policy gradient needs beside the trajectories: `advantages` [steps, own], and the noise of the paths; or,
    where the estimator gives vec_k, all of the loss that no update changes, which is one copy of the trajectories less:

        e_k / 2 |v - v_base|^2 - b_k v . vec_k / beta = e_k / 2 |v - v_old|^2 + slopes_k . (v - v_old) + offsets_k,

    v_old the policy that made the trajectories; without e_k where steps have no price.

    Args:
        slopes: e_k (v_old - v_base) - b_k vec_k / beta, [steps, own, *event].
        offsets: [steps, own].
    """

    advantages: Tensor | None = None
    slopes: Stored | None = None
    offsets: Tensor | None = None


class ScoreAsAction(PolicyGradient):
    """Score as Action. Any reward; aims at p_base(x) exp(r(x) / beta) where the solver is memoryless."""

    name: Literal["score-as-action"] = "score-as-action"
    preset: Literal["ddpo"] | None = None
    """Start from the settings of a published method; keys given beside it win. ddpo is the method `ddpo` now, which has fewer
    settings."""

    estimator: Estimator = "return-minus-value"
    """Form of the policy gradient; see the top of this file. By default closed-form for solvers without noise."""
    running_reward: Literal["path-kl", "transition-kl", "none"] = "path-kl"
    """Subtracted from the reward, times beta: the path KL in the closed form of continuous time, which means the same on every
    grid; the KL of the solver's Gaussian transitions, as other implementations have it; or nothing."""
    standardize: bool = False
    """For the estimator return: divide the centred rewards by their standard deviation, over the batch or, where the flow is
    bound to conditions, over the samples of one condition, as they are centred."""
    update: Literal["trust-region", "clip"] = "trust-region"
    """trust-region: a penalty on the path KL to the policy that made the trajectories. clip: PPO's clipped ratio."""
    target_kl: Positive = 0.05
    """For the update trust-region: path KL of one iteration, in nats; the penalty is halved or doubled until it fits."""
    clip_range: Positive = 0.3
    """For the update clip: limit on |ratio - 1|, for a step as long as the whole way from noise to data."""
    clip_scaling: Literal["sqrt-step", "none"] = "sqrt-step"
    """sqrt-step multiplies clip_range by the square root of the length of the step, with which the spread of the ratio grows,
    so that it means the same on every grid."""
    critic: Critic = Critic()
    """Value function, for the estimators that have one."""

    num_passes: Count = 2
    """Optimizer steps on each batch of trajectories, each on its own draw of time steps."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps at the start in which the policy stays as it is, and only the critic learns, with the reward if that learns too:
    before they have learned, their gradients are noise that the policy would follow."""

    @property
    def needs(self) -> Needs:
        """Requirements of the estimator. Those whose gradient rests on the critic are wrong where it does not know the
        condition of a sample; for the others it is a baseline, and any is right."""
        of_critic = self.estimator in ("temporal-difference", "closed-form", "pathwise")
        return Needs(
            reward_gradient=self.estimator == "pathwise" or (self._uses_value_gradient and self.critic.form != "reward-free"),
            learned_reward=True,
            running_reward=True,
            critic_of_condition=f"method.estimator {self.estimator!r}" if of_critic else None,
            without_critic="return-minus-value, which is right with any critic, or return",
            passes=self.num_passes,
            warmup_steps=self.critic_warmup_steps,
            exact_trajectories="method.update 'clip'" if self.update == "clip" else None,
            trajectory_copies=2 + (self.running_reward != "none" or self._uses_value_gradient),
        )

    @property
    def _priced(self) -> bool:
        return self.running_reward != "none"

    @property
    def _uses_value_gradient(self) -> bool:
        return self.estimator in ("closed-form", "pathwise")

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "dxmi":
            raise ValueError("preset 'dxmi' is the method 'dxmi' now")
        values = from_preset(PRESETS, values)
        if isinstance(values, dict) and "estimator" not in values:
            sampler = {key: values[key] for key in ("solver", "eta") if key in values}
            with suppress(ValidationError):  # the sampler's own check reports it
                values["estimator"] = "return-minus-value" if Sampling.model_validate(sampler).has_noise else "closed-form"
        return values

    @model_validator(mode="after")
    def _check(self) -> ScoreAsAction:
        if self.sampling.has_noise and not self.sampling.is_chain:
            raise ValueError(
                f"solver {self.solver!r} has noise and no transition densities: it is to sample with; use memoryless"
            )
        if not self._uses_value_gradient and not self.sampling.has_noise:
            raise ValueError(f"estimator {self.estimator!r} needs a solver with noise, {self.solver} has none; use closed-form")
        if self.update == "clip" and self._uses_value_gradient:
            raise ValueError(f"update 'clip' requires an advantage; {self.estimator} has none; use temporal-difference")
        if self.standardize and self.estimator != "return":
            raise ValueError("standardize is for the estimator 'return' alone: the others' advantages are in units of reward")
        return self

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published settings of the preset, if there are any."""
        return OPTIMIZERS.get(self.preset or "", {})

    def learns_nothing(self, group: int) -> str | None:
        """See `MethodSettings`: the return of a single sample is its own mean."""
        if group > 1 or self.estimator != "return":
            return None
        return (
            "estimator return compares the samples of a prompt, a class or a batch, and the advantage of a single sample is"
            " always 0"
        )

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """p_base exp(r / beta), as far as the price of a step and the sampler reach it; see `Sampling.limits`."""
        if self.running_reward == "none":
            return exponential_tilt(self.beta, [NO_LAW], reaches="none")
        caveats = self.sampling.limits(start)
        if self.running_reward == "transition-kl":
            caveats.append("The KL of the solver's transitions is not the path KL, and changes with the number of steps.")
        priced = self.running_reward == "path-kl" and self.sampling.build().is_memoryless
        return exponential_tilt(self.beta, caveats, reaches="exact" if priced else "none")

    def priced_chain(self, start: Start = 0.0) -> tuple[Chain, Tensor] | None:
        """The chain of the policy and the energy of a change of its velocities; None for a solver that is no chain, or without
        a price."""
        if not self.sampling.is_chain or self.running_reward == "none":
            return None
        chain = self.sampling.chain(start)
        energy = self._energy(chain)
        if self.sampling.has_noise and chain.std[-1] == 0:  # the base takes that step
            energy = torch.cat([energy[:-1], torch.zeros_like(energy[-1:])])
        return chain, energy

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> State:
        """The state that is kept between iterations. Raises InputError for a critic that does not fit; see `Critic.build`."""
        if self.estimator == "return":  # it has no critic
            return State(Value(nn.Identity(), FORMS["reward-free"]))
        value = self.critic.build(event_shape, seed, device)
        return State(value, torch.optim.Adam(value.network.parameters(), lr=self.critic.learning_rate))

    def gradients(self, batch: Batch, state: State) -> Iterator[dict[str, float]]:
        """One iteration of the algorithm: yields once for each of `num_passes` optimizer steps, its gradient accumulated.

        Trajectories are drawn from `batch.tuned` itself, not from an average of its weights: a policy gradient is on-policy.
        Where samples alone are guided, the gradient is taken through the conditional velocity of the guided policy alone.

        Args:
            state: kept between iterations; changed in place.

        Raises InputError if a solver returns wrong states, or if the ratio is not 1 before the first update (a network that
        samples and trains differently).
        """
        size, generator = len(batch), batch.generator
        with torch.no_grad():
            drawn, batch = self._draw(batch, partial(known_values, state.value))
            if not isinstance(batch.reward, LearnedReward):  # its first values tell nothing of the scale of later ones
                state.value.fit_scale(drawn.rewards)
            members = batch.tuned.groups(len(batch), drawn.end.device)
            advantages = None if self._uses_value_gradient else self._advantages(state.value, drawn.experience, members)
        warm = state.iterations >= self.critic_warmup_steps
        vectors = self._vectors(batch, state.value, drawn, advantages) if warm else None
        state.iterations += 1
        measured = self._measured(drawn, size - len(batch))
        if state.optimizer is not None:
            measured["critic_loss"] = improve(
                state.value, state.optimizer, drawn.experience, self.critic, generator, state.iterations
            )
        measured |= batch.learn(drawn.end)
        if vectors is None:
            yield {**measured, "loss": 0.0, "step_kl": 0.0, "penalty": state.penalty}
            return
        for i in range(self.num_passes):
            pairs = choose_timesteps(
                self.train_timesteps, len(drawn.path.velocities), self.num_inference_steps, len(batch), generator
            ).to(drawn.end.device)
            loss, step_kl = self._improve_policy(batch, drawn, vectors, pairs, state, first=i == 0)
            if i == self.num_passes - 1 > 0:
                self._adapt(state, step_kl)
            yield {**measured, "loss": loss, "step_kl": state.step_kl, "penalty": state.penalty}

    def _energy(self, chain: Chain) -> Tensor:
        return chain.control_scale**2 if self.running_reward == "transition-kl" else chain.energy

    def _vectors(self, batch: Batch, value: Value, drawn: Trajectories, advantages: Tensor | None) -> Vectors:
        """The actions of the paths: how much better than expected each was, or what grad V makes of the loss, in the place of
        the velocities of the base."""
        path, chain, of_base = drawn.path, drawn.path.chain, drawn.base_velocities
        if advantages is not None:
            batch.own_finite(advantages, "advantage", chain.times)
            return Vectors(advantages=advantages)
        prices = batch.apart(drawn.prices)
        slopes, offsets = of_base or batch.storage.new(len(prices), batch.x[batch.own]), torch.zeros_like(prices)
        for k, old in enumerate(path.velocities):
            gain, energy = (c[k].to(old) for c in (chain.v_scale, self._energy(chain)))
            pull = gain / self.beta * self._vector(batch, value, path, k)
            offsets[k] = -(old * pull).flatten(1).sum(1)
            if of_base is not None:
                offsets[k] += prices[k] / self.beta
                pull = pull - energy * (old - of_base[k])
            slopes[k] = -pull
        batch.own_finite(slopes, "vector of the policy gradient", chain.times)
        return Vectors(slopes=slopes, offsets=offsets)

    def _vector(self, batch: Batch, value: Value, path: Trajectory, k: int) -> Tensor:
        """grad V at step k, or after it, as the estimator has it; after the last one it is that of the reward."""
        after = int(self.estimator == "pathwise")
        if after and k == len(path.velocities) - 1:
            return self._at_the_end(batch, path)
        return self._value_gradient(batch, value, path.states[k + after], path.chain.times[k + after])

    def _advantages(self, value: Value, batch: Experience, members: list[Tensor]) -> Tensor:
        """Advantages [steps, own], in units of reward unless standardised; of `return`, among the samples of one condition,
        whichever process has them."""
        if self.estimator == "return":
            total = batch.rewards - batch.costs.sum(0)
            centred = among_others(total, members, standardize=self.standardize)
            return centred[batch.own].expand(len(batch.costs), -1)
        values, costs = batch.values(value), batch.costs[:, batch.own]
        if self.estimator == "return-minus-value":
            return returns(values, costs, torch.ones(len(costs))) - values[:-1]
        return values.diff(dim=0) - costs

    def _improve_policy(
        self, batch: Batch, drawn: Trajectories, vectors: Vectors, pairs: Tensor, state: State, *, first: bool
    ) -> tuple[float, float]:
        """Accumulate the gradient of -J / beta, with its trust region, over the chosen (step, sample) pairs. Returns the loss
        and the path KL from the policy that made the trajectories, scaled up to all steps."""
        advantages, of_base = vectors.advantages, drawn.base_velocities

        def loss_of(actions: Actions) -> Tensor:
            at = actions.k, actions.i
            if vectors.slopes is not None and vectors.offsets is not None:
                if first:
                    check_velocities(actions.v.detach(), actions.old)
                along = ((actions.v - actions.old) * vectors.slopes.at(*at)).flatten(1).sum(1) + vectors.offsets[at]
                return (along if of_base is None else along + actions.step_kl) + state.penalty * actions.step_kl
            assert advantages is not None
            terms = torch.zeros_like(actions.step_kl) if of_base is None else actions.price(of_base)
            if self.update == "clip":
                return (
                    terms
                    - self._clipped(actions.log_ratios(first=first), advantages[at], actions.path.chain, actions.k) / self.beta
                )
            terms = terms - actions.score_function(advantages[at], first=first) / self.beta
            return terms + state.penalty * actions.step_kl

        return self._improve(batch, drawn, pairs, loss_of)

    def _clipped(self, log_ratios: Tensor, advantages: Tensor, chain: Chain, k: Tensor) -> Tensor:
        """PPO's objective [pairs] at steps k."""
        limit = torch.full_like(log_ratios, self.clip_range)
        if self.clip_scaling == "sqrt-step":
            limit = limit * chain.times.diff().sqrt().to(limit)[k]
        return clipped(log_ratios, advantages, limit)

    def _adapt(self, state: State, step_kl: float) -> None:
        """Double or halve the penalty where the path KL of the iteration is far from its target."""
        state.step_kl = step_kl
        if step_kl > 1.5 * self.target_kl:
            state.penalty = min(state.penalty * 2, 1e4)
        elif step_kl < self.target_kl / 1.5:
            state.penalty = max(state.penalty / 2, 1e-3)
