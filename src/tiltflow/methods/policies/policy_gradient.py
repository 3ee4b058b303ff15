r"""The core of policy gradients: a sampler is a policy, its steps are actions, and the noise of a step says how it was changed.

With the gain b_k, the noise s_k and the energy e_k of step k, and advantages A_k in units of the price beta of a nat,

    score function       - b_k v . eps_k A_k / s_k
    importance sampling  - min(rho_k A_k, clip(rho_k) A_k),      rho_k the density of the step over that when it was taken

have the same gradient before the first update; the second serves several updates. A price on the path KL adds
e_k / 2 |v - v_base|^2, whose gradient is that of the KL of the step alone: what the step does to the KL of later ones is in
the advantages, or is left out.
"""

# Mutation tests: test_score_as_action.py test_group_policies.py

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow import processes
from tiltflow.control.timesteps import Stratum
from tiltflow.control.value import Experience, Value
from tiltflow.errors import InputError
from tiltflow.flows.field import VelocityField
from tiltflow.flows.interpolant import expand
from tiltflow.flows.linearize import linearize
from tiltflow.methods import Tilting
from tiltflow.optimization import located
from tiltflow.rewards import NonFiniteRewards, Reward, select
from tiltflow.rewards.functions.checked import finite_only, value_and_gradient
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import Act, Trajectory, simulate
from tiltflow.samplers.sampling import Sampling, SolverName
from tiltflow.samplers.stored import AS_COMPUTED, Storage, Stored
from tiltflow.streams import Noise
from tiltflow.training.batch import Batch
from tiltflow.training.scoring import Scoring

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Form = Literal["score-function", "importance-sampling"]
Known = Callable[[Trajectory, Reward, NonFiniteRewards], Tensor]
"""(path, reward, what to do with rewards that are not finite) -> what is known of the values of the states, [steps, own]."""
# kvablack/ddpo-pytorch (MIT)
DDPO_OPTIMIZER: dict[str, Any] = {
    "learning_rate": 3e-4,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-4,
    "max_grad_norm": 1.0,
}
"""The published settings of DDPO's optimizer."""
NO_LAW = "Nothing but the size of the steps holds the model near the base: there is no target law."
MOST_STANDARDIZED = 5.0  # standardised rewards are clipped here, as in DDPO's code
RATIO_TOLERANCE = 1e-2  # nats: rounding of sums over many dimensions stays below
VELOCITY_TOLERANCE = 2e-2  # of the largest velocity: a few roundings of bfloat16, by which two kernels may differ


@dataclass(frozen=True)
class Trajectories:
    """Trajectories of a batch; what is large, of the samples of this process.

    Args:
        path: the controlled steps, of its own samples.
        end: the samples that they end in, [batch, *event].
        rewards: of these samples, [batch].
        base_velocities: of the base at the steps, of its own samples; None where steps have no price.
        prices: beta times the path KL of the steps, [steps, batch].
        gains: the running reward of the paths, [batch]; None without one.
        experience: the trajectories as the critic sees them.
    """

    path: Trajectory
    end: Tensor
    rewards: Tensor
    base_velocities: Stored | None
    prices: Tensor
    gains: Tensor | None
    experience: Experience


@dataclass(frozen=True)
class Actions:
    """Some actions of the trajectories, and the policy as it is now there.

    Args:
        k, i: the steps and the samples, [pairs].
        x: the states, [pairs, *event].
        old: the velocities of the policy that made the trajectories, [pairs, *event].
        v: those of the present one.
        energy: of the steps, [pairs].
        step_kl: the path KL of the present policy from the one that made the trajectories, [pairs].
    """

    path: Trajectory
    k: Tensor
    i: Tensor
    x: Tensor
    old: Tensor
    v: Tensor
    energy: Tensor
    step_kl: Tensor

    def price(self, base_velocities: Stored) -> Tensor:
        """The path KL of the steps from the base, [pairs]."""
        return self.energy / 2 * (self.v - base_velocities.at(self.k, self.i)).flatten(1).square().sum(1)

    def score_function(self, advantages: Tensor, *, first: bool) -> Tensor:
        """b_k v . eps_k A_k / s_k [pairs], of advantages [pairs]. Raises InputError if before the `first` update the velocities
        are not those of the trajectories."""
        if first:
            check_velocities(self.v.detach(), self.old)
        gain, std = (c.to(self.x)[self.k] for c in (self.path.chain.v_scale, self.path.chain.std))
        vectors = self.path.noise_at(self.k, self.i) * expand(advantages / std, self.x)
        return gain * (self.v * vectors).flatten(1).sum(1)

    def log_ratios(self, *, first: bool) -> Tensor:
        """log of the densities of the steps over those when they were taken, [pairs]. Raises InputError if before the `first`
        update they are not 0."""
        scale = self.path.chain.control_scale.to(self.x)[self.k]
        found = log_ratio(expand(scale, self.x) * (self.v - self.old), self.path.noise_at(self.k, self.i))
        if first:
            check_ratio(found.detach())
        return found


class PolicyGradient(Tilting):
    """Part of the settings of every policy gradient: the sampler that is the policy, and which of its steps are learned."""

    solver: SolverName = "memoryless"
    """Any solver of `Sampling`; `package.module:function` for one of your own."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 40
    """Steps of the sampler that is tuned, from noise to data."""
    shift: Positive = 1.0
    """Above 1, its steps are smaller near the noise; see `time_grid`."""
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Noise of `ddim` and `euler-maruyama`, as in `Sampling`."""
    train_timesteps: tuple[Stratum, ...] | None = None
    """Steps that enter the loss of the policy: all, or `count` of each part of the grid."""
    num_passes: Count = 1
    """Optimizer steps on each batch of trajectories, each on its own draw of time steps."""

    @property
    def sampling(self) -> Sampling:
        """The sampler of the policy."""
        return Sampling(solver=self.solver, num_inference_steps=self.num_inference_steps, shift=self.shift, eta=self.eta)

    @property
    def _priced(self) -> bool:
        """True if steps away from the base have a price."""
        return True

    def _energy(self, chain: Chain) -> Tensor:
        return chain.energy

    def rollout(
        self,
        tuned: VelocityField,
        base: VelocityField,
        x: Tensor,
        generator: Noise,
        start: Start = 0.0,
        act: Act | None = None,
        storage: Storage = AS_COMPUTED,
    ) -> tuple[Trajectory, Tensor]:
        """Trajectories of the tuned flow, guided by `act` if given, and the samples [batch, *event] at their ends. If only
        the last step of a sampler has no noise, it is not an action: the base takes it."""
        path = self._simulate(tuned, x, generator, start, act, storage)
        last, end = len(path.velocities), path.states[-1]
        if last < len(path.chain):
            end = path.chain.mean(last, end, base(end, path.chain.times[last]))
        return path, end

    def _simulate(
        self, tuned: VelocityField, x: Tensor, generator: Noise, start: Start, act: Act | None, storage: Storage
    ) -> Trajectory:
        return simulate(tuned, x, self.sampling, generator, start=start, act=act, storage=storage)

    def _draw(self, batch: Batch, known_values: Known) -> tuple[Trajectories, Batch]:
        """The trajectories of a batch, and the batch, both without the samples whose rewards are not finite."""
        (tuned, guided), (base, guided_base) = batch.own_field(batch.tuned), batch.own_field(batch.base)
        act, x = None if guided is None else guided.guide, batch.x[batch.own]
        path, end = self.rollout(tuned, guided_base or base, x, batch.own_noise, batch.start, act, batch.storage)
        end = processes.gathered([end], len(batch))
        chain, count = path.chain, len(path.velocities)
        batch.own_finite(path.velocities, "velocity", chain.times)
        base_velocities = None if not self._priced else batch.storage.new(count, x)
        squares = []
        with Scoring(batch) as scoring:
            scoring.add(end)
            for k, t in zip(range(count), chain.times, strict=False):  # step by step: there is no room for a copy
                of_base = base(path.states[k], t)
                squares.append((path.velocities[k] - of_base).flatten(1).square().sum(1))
                if base_velocities is not None:
                    base_velocities[k] = of_base
            rewards = scoring.rewards()
        prices = self.beta / 2 * self._energy(chain)[:count, None].to(x) * batch.together(torch.stack(squares))
        costs = torch.zeros_like(prices) if not self._priced else prices
        with located(batch.own):
            gains = batch.objective.gains(path.states, chain.times)
            known = known_values(path, select(batch.reward, batch.own), batch.non_finite)
        known = batch.together(known).to(costs)
        if gains is not None:
            gains = batch.together(gains).to(costs)
            costs = costs - gains[:count]
            costs[-1] -= gains[count:].sum(0)  # a last step that the base takes belongs to the action before it
            gains = gains.sum(0)
        if (kept := finite_only(rewards + known.sum(0))) is not None:
            path = path.moved(lambda values: batch.own_of(values, kept))
            base_velocities = None if base_velocities is None else batch.own_of(base_velocities, kept)
            batch, end, rewards = batch.select(kept), end[kept], rewards[kept]
            prices, costs, known = prices[:, kept], costs[:, kept], known[:, kept]
            gains = None if gains is None else gains[kept]
        times = torch.cat([chain.times[:count], chain.times[-1:]])
        states, rewards_of = path.states.data[:count], rewards.to(costs)
        experience = Experience(states, times, known, costs, rewards_of, batch.own, batch.counted())
        return Trajectories(path, end, rewards, base_velocities, prices, gains, experience), batch

    def _measured(self, drawn: Trajectories, dropped: int) -> dict[str, float]:
        """The metrics of the trajectories."""
        price = drawn.prices.sum(0)
        return {
            "reward": drawn.rewards.mean().item(),
            "reward_std": drawn.rewards.std(correction=0).item(),
            "path_kl": price.mean().item() / self.beta,
            "objective": (drawn.rewards - price + (0 if drawn.gains is None else drawn.gains)).mean().item(),
            **({"dropped": float(dropped)} if dropped else {}),
        }

    def _improve(
        self, batch: Batch, drawn: Trajectories, pairs: Tensor, loss_of: Callable[[Actions], Tensor]
    ) -> tuple[float, float]:
        """Accumulate the gradient of a loss [pairs] over the chosen (step, sample) pairs. Returns the loss and the path KL from
        the policy that made the trajectories, scaled up to all steps."""
        path, tuned = drawn.path, batch.tuned.select(batch.own)
        k = batch.apart(pairs)
        i = torch.arange(k.shape[1], device=k.device).expand_as(k).flatten()
        k = k.flatten()

        def terms_of(part: Tensor) -> dict[str, Tensor]:
            kk, ii = k[part], i[part]
            x, old = path.states.at(kk, ii), path.velocities.at(kk, ii)
            energy = self._energy(path.chain).to(x)[kk]
            v = tuned.select(ii)(x, path.chain.times.to(x.device)[kk])
            step_kl = energy / 2 * (v - old).flatten(1).square().sum(1)
            return {"loss": loss_of(Actions(path, kk, ii, x, old, v, energy, step_kl)), "step_kl": step_kl.detach()}

        sums = batch.accumulate_own(terms_of, batch.counted()[i], over=len(batch))
        return sums["loss"], sums["step_kl"] * len(path.velocities) / max(len(pairs), 1)

    def _value_gradient(self, batch: Batch, value: Value, x: Tensor, t: Tensor) -> Tensor:
        return batch.map_own(lambda some, part: value.gradient(x[part], t, some.tuned, some.reward))

    def _at_the_end(self, batch: Batch, path: Trajectory) -> Tensor:
        """The gradient of the reward after the last controlled step, [own, *event]."""
        chain, count = path.chain, len(path.velocities)
        states = path.states[count]

        def last(some: Batch, part: slice) -> Tensor:
            x = states[part]
            if count == len(chain):
                return value_and_gradient(some.reward, x)[1].to(x)
            # the last state is one noiseless step of the base before the sample
            v, pullback = linearize(some.base, x, chain.times[count])
            gradient = value_and_gradient(some.reward, chain.mean(count, x, v))[1].to(x)
            x_scale, v_scale = (c[count].item() for c in (chain.x_scale, chain.v_scale))
            gradient = x_scale * gradient + pullback(v_scale * gradient)
            if some.objective.running is not None:
                gradient = gradient + some.objective.gradient(x, chain.times, count).to(x)
            return gradient

        return batch.map_own(last)


def known_values(value: Value, path: Trajectory, reward: Reward, non_finite: NonFiniteRewards) -> Tensor:
    """The part of the values of the states that is not learned, [steps, own]."""
    steps = zip(path.velocities, path.states, path.chain.times, strict=False)
    return torch.stack([value.known(x + (1 - t.item()) * v, t, reward, non_finite) for v, x, t in steps])


def among_others(values: Tensor, members: list[Tensor], *, standardize: bool) -> Tensor:
    """How much better each of the values [batch] is than the mean of the others of its group: a baseline that does not see the
    sample leaves the gradient unbiased.

    Args:
        members: the indices of each group.
        standardize: in units of the group's standard deviation, and at most `MOST_STANDARDIZED` of them.
    """
    centred = torch.zeros_like(values)
    for group in members:
        own, size = values[group], len(group)
        centred[group] = (own - own.mean()) * (size / max(size - 1, 1))
        if standardize:
            standard = centred[group] / (own.std(correction=0) + 1e-8)
            centred[group] = standard.clamp(-MOST_STANDARDIZED, MOST_STANDARDIZED)
    return centred


def log_ratio(change: Tensor, noise: Tensor) -> Tensor:
    """log of the density of a step under a changed policy over that under the policy that took it: [batch]. It is a sum over
    dimensions; with a mean, a clip would depend on the size of the sample.

    Args:
        change: change of the step's mean, in units of its noise, [batch, *event].
        noise: the standard normal noise of the step, [batch, *event].
    """
    return (change * noise).flatten(1).sum(1) - change.flatten(1).square().sum(1) / 2


def clipped(log_ratios: Tensor, advantages: Tensor, limit: Tensor) -> Tensor:
    """PPO's objective, min(ratio A, clip(ratio) A) [pairs], of advantages and limits on |ratio - 1| [pairs]."""
    ratio = log_ratios.exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - limit, 1 + limit) * advantages)


def check_velocities(velocities: Tensor, sampled: Tensor) -> None:
    """Raises InputError if before the first update the velocities [pairs, *event] are not those of the trajectories, up to the
    rounding of bfloat16: the ratio is then not 1, and the gradient is not that of the policy that was sampled."""
    change = (velocities - sampled).flatten(1).norm(dim=1).max().item()
    size = sampled.flatten(1).norm(dim=1).max().item()
    if not change <= VELOCITY_TOLERANCE * size:
        raise InputError(
            "before the first update the policy's ratio must be 1, but the network gives other velocities in training than in"
            f" sampling, by up to {change / max(size, 1e-30):.1%} (dropout, batch statistics, a random number of its own?)"
        )


def check_ratio(log_ratios: Tensor) -> None:
    """Raises InputError if the ratio to the policy that made the trajectories is not 1, up to rounding."""
    worst = log_ratios.abs().max().item()
    if not worst <= RATIO_TOLERANCE:
        raise InputError(
            f"before the first update the policy's ratio must be 1, its logarithm is up to {worst:.3g}: the network gives other"
            " velocities in training than in sampling (dropout, batch statistics, another precision?)"
        )
