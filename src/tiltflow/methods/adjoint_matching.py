r"""Adjoint Matching: memoryless stochastic optimal control as a regression (Domingo-Enrich et al., arXiv 2409.08861).

To tilt a flow by exp(r / beta), control its memoryless sampler at the price of the path KL. The optimal control of a chain
with steps N(m_k(x) + s_k w_k, s_k^2) is w_k = -s_k E[a_{k+1} | x_k], a the lean adjoint, so

    loss = E sum_k | w_k(x_k) + s_k a_{k+1} |^2,    w_k = v_scale_k (v_tuned - v_base)(x_k, t_k) / s_k,

with trajectories of the tuned chain, held fixed. Its only critical point is the optimal control, whose terminal law
is p_base(x) exp(r(x) / beta) up to what K steps of Gaussian noise cannot do, of order h: on one Gaussian that is in the
variance alone, on a mixture in the weights of the modes and the mean reward as well (`tiltflow.laws.chain_optimum`). One
iteration is

    1.  roll the tuned chain out, without gradients
    2.  run the lean adjoint back along it: vector-Jacobian products of the base
    3.  regress the control of some of the steps on it.

With a `pool` step 1 is of many samples, and steps 2 and 3 are of a few of them, which stand for all by their weights: most in
the tail that a utility such as the CVaR prices, as only they have a gradient (arXiv 2511.22640).

With `control_from` above 0 steps 2 and 3 are for the times from there on, and the steps before learn from the ends of the paths
(`tiltflow.training.self_distillation`): on the tilt both agree.
"""

# Mutation tests: test_adjoint_matching.py

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.control.adjoint import Pairing, lean_adjoint
from tiltflow.control.control_variate import noise_to_come, predicted
from tiltflow.control.suffix_weights import suffix_weights
from tiltflow.control.timesteps import Stratum, choose_timesteps
from tiltflow.errors import InputError
from tiltflow.flows.interpolant import expand
from tiltflow.laws.late_control import late_control
from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.methods import Tilting, from_preset
from tiltflow.optimization import Numbers
from tiltflow.rewards.functions.checked import evaluate, finite_only
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Spacing, Start
from tiltflow.samplers.rollout import Trajectory
from tiltflow.samplers.sampling import MemorylessSolver, Sampling
from tiltflow.samplers.solvers.memoryless_offset import memoryless_offset
from tiltflow.samplers.stored import Stored
from tiltflow.settings import Settings
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs
from tiltflow.training.self_distillation import self_distillation
from tiltflow.utilities.estimation.tail_pool import Pool, strata

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


# What the authors published. `paper` is appendix G of arXiv 2409.08861 (its own 512-pixel flow model, lambda = 1 / beta in
# {1000, 2500, 12500}); `official-code` is microsoft/soc-fine-tuning-sd for Stable Diffusion 1.5 (lambda = 100).
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "solver": "memoryless-offset",
        "num_inference_steps": 40,
        "pairing": "right",
        "reward_at": "denoised",
        "loss_clip": 1.6,
        "train_timesteps": [{"start": 0, "end": 0.75, "count": 10}, {"start": 0.75, "end": 1, "count": 10}],
        "share_timesteps": True,
    },
    "official-code": {
        "solver": "ddim-half-way",
        "num_inference_steps": 50,
        "pairing": "before-diffusion",
        "reward_at": "end",
        "drop_quantile": 0.9,
        "train_timesteps": [{"start": 0, "end": 0.6, "count": 2}, {"start": 0.6, "end": 1, "count": 2}],
        "share_timesteps": 5,
    },
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "paper": {
        "learning_rate": 2e-5,
        "adam_beta1": 0.95,
        "adam_beta2": 0.999,
        "adam_weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "lr_warmup_steps": 0,
        "lr_scheduler": "constant",
    },
    "official-code": {
        "learning_rate": 3e-6,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_weight_decay": 0.0,
        "max_grad_norm": None,
        "lr_warmup_steps": 20,
        "lr_warmup_from_zero": True,
        "lr_scheduler": "constant",
    },
}
"""The optimizer of each preset."""


class TailPool(Settings):
    """Which samples of a batch are learned from. Each has the weight N_h / (N n_h), with n_h kept of the N_h of its kind."""

    tail: Count = 128
    """Samples whose reward is not 0, at most: the tail of a superquantile or a CVaR."""
    body: Count = 64
    """Samples whose reward is 0, at most: they keep the rest of the law where it is."""


class Regression(NamedTuple):
    """Inputs and targets of the regression, of the steps from `first` on: [steps, batch, *event].

    Args:
        base_velocities: None where the targets are not adjoints a_{k+1}, but v_scale_k v_base / s_k - s_k a_{k+1}: all of the
            residual that no update changes. That is one copy of the trajectories less, at the price of another rounding.
    """

    states: Stored
    base_velocities: Stored | None
    targets: Stored
    first: int

    def residual(self, v: Tensor, gain: Tensor, std: Tensor, row: Tensor, i: Tensor) -> Tensor:
        """w_k + s_k a_{k+1} of the rows and samples [pairs] for the velocities v [pairs, *event]."""
        target = self.targets.at(row, i)
        if self.base_velocities is None:
            return gain * v - target
        return gain * (v - self.base_velocities.at(row, i)) + std * target


@dataclass
class State(Numbers):
    """The running threshold of `drop_quantile`."""

    threshold: float = 0.0
    updates: int = 0


class AdjointMatching(Tilting):
    """Adjoint Matching. Needs a differentiable reward; aims at p_base(x) exp(r(x) / beta)."""

    name: Literal["adjoint-matching"] = "adjoint-matching"
    preset: Literal["paper", "official-code"] | None = None
    """Start from a published setting; keys given beside it win."""

    solver: MemorylessSolver = "memoryless"
    """The chain that is tuned: memoryless (exact in the limit of small steps), memoryless-offset, ddpm, ddim-half-way or
    euler-maruyama; any memoryless solver of `Sampling`."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 40
    """Steps of the chain, from noise to data."""
    shift: Positive = 1.0
    """Above 1, the chain's steps are smaller near the noise; see `time_grid`."""
    spacing: Spacing = "even"
    """middle: before that shift, smaller steps in the middle, which leave less between the optimum of the chain and the tilt.
    Sample on the same grid, or a finer one."""
    pairing: Pairing = "after"
    """Which adjoint step k regresses on: after, a_{k+1} (exact); before, a_k of the same chain; before-diffusion, that of
    variance-preserving states, as in the authors' code; right, a_k as printed in the paper."""
    adjoint: Literal["lean", "full"] = "lean"
    """lean: of the base's chain, which is Adjoint Matching. full: of the chain as it is controlled, and of the control's cost:
    the gradient is that of back-propagation through the chain (the discrete adjoint). Same fixed point, twice the products."""
    reward_at: Literal["end", "denoised"] = "end"
    """Where the reward's gradient is taken if the last step is noisy: at its end, or at the base's denoised start."""
    control_from: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Control the steps from this time on alone, and need no adjoint before it, where it is mostly noise. 0 is the paper. The
    steps before it learn by `early`."""
    early: Literal["self-distillation", "base"] = "self-distillation"
    """What the steps before `control_from` learn. self-distillation: flow matching on the samples of the batch, which has the
    tilt as its fixed point, after rounds that are fewer the earlier `control_from` is; it must be before the modes of the data
    part. base: to stay as they are, which leaves the law of the states at `control_from` untilted."""
    bootstrap: Annotated[float, Field(ge=0)] = 0.0
    """Above 0, the learned control replaces part of the adjoint, 1 - exp(-bootstrap std_k^2) of it at step k. The fixed point
    is the same for a network that can represent it, with far less noise near t = 0, where most of the noise is; a network that
    cannot ends at a weaker tilt. 0 is the paper."""
    train_timesteps: tuple[Stratum, ...] | None = None
    """Steps that enter the loss: all, or `count` of each part of the grid."""
    share_timesteps: bool | Count = False
    """Draw steps once for the whole batch, or for each group of this many samples in a row, instead of for each sample."""
    loss_clip: Positive | None = None
    """Clip each term, in the paper's units |w|^2 / h, at loss_clip / beta^2. A clipped term has no gradient."""
    drop_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Drop the terms in the loss whose root is above a running mean (decay 0.9) of their quantile: over the batch, or over each
    group of `share_timesteps`, one after another."""
    num_passes: Count = 1
    """Optimizer steps on each batch of trajectories, each on its own draw of time steps."""
    reweight_passes: bool = False
    """Weight the terms of all passes but the first by how much likelier the model as it is by then goes on as the path did:
    without it they are those of the model as it was. Costs another rollout's network evaluations a pass."""
    pool: TailPool | None = None
    """Roll out a whole batch, `train_batch_size` samples without gradients, and learn from a part of it alone: for the rewards
    of stages, which are 0 outside the tail that a utility prices. The mean gradient is that of the whole batch."""
    control_variate: bool = False
    """Subtract from each term what the noise to come predicts of it: the same mean, with much less noise near the data where
    the reward's curvature is the same in all directions. Costs no network evaluation."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        return from_preset(PRESETS, values)

    @model_validator(mode="after")
    def _check(self) -> AdjointMatching:
        if self.pairing == "right" and (self.solver, self.shift, self.spacing) != ("memoryless-offset", 1, "even"):
            raise ValueError(
                "pairing 'right' is the paper's recursion: it needs solver 'memoryless-offset', shift 1 and even steps"
            )
        if self.bootstrap > 0 and self.pairing != "after":
            raise ValueError("bootstrap needs pairing 'after': only there is the control the mean of the adjoint")
        if self.adjoint == "full" and (self.pairing != "after" or self.bootstrap > 0 or self.control_from > 0):
            raise ValueError(
                "adjoint 'full' is that of the whole chain: it needs pairing 'after', bootstrap 0 and control_from 0"
            )
        if self.control_from > 0 and self.drop_quantile is not None:
            raise ValueError(
                "drop_quantile is over all the steps that are drawn, and control_from leaves some of them out; use one"
            )
        if self.pool is not None:
            of_alike = {
                "drop_quantile": self.drop_quantile is not None,
                "control_variate": self.control_variate,
                "reweight_passes": self.reweight_passes,
                "control_from with self-distillation": self.control_from > 0 and self.early == "self-distillation",
            }
            for name in (name for name, used in of_alike.items() if used):
                raise ValueError(f"{name} counts all samples alike, and those of a pool have weights; use one")
        return self

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published settings of the preset."""
        return OPTIMIZERS.get(self.preset or "", {})

    def chain(self, start: Start = 0.0) -> Chain:
        """The chain that is tuned, from time `start`."""
        return self.sampling.chain(start)

    def priced_chain(self, start: Start = 0.0) -> tuple[Chain, Tensor]:
        """The chain that is tuned, and the weights of a change of its velocities in the path KL; see `Tilting.priced_chain`."""
        chain = self.chain(start)
        controlled = chain.times[:-1] >= (chain.times[self._first_controlled(chain)] if self.early == "base" else 0)
        return chain, controlled * chain.control_scale**2

    @property
    def sampling(self) -> Sampling:
        """The sampler of the chain that is tuned."""
        grid: dict[str, Any] = {"shift": self.shift, "spacing": self.spacing}
        return Sampling(solver=self.solver, num_inference_steps=self.num_inference_steps, **grid)

    @property
    def needs(self) -> Needs:
        """The gradient of the reward, and memory for the adjoints."""
        late = self.control_from > 0  # the running reward before it would be left out
        return Needs(
            reward_gradient=True,
            learned_reward=True,
            running_reward=not late,
            passes=self.num_passes,
            exact_trajectories="method.reweight_passes" if self.reweight_passes else None,
            trajectory_copies=3,
        )

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """p_base exp(r / beta), as far as the sampler reaches it; see `Sampling.limits`. Raises InputError if no step is
        controlled."""
        self._first_controlled(self.chain(start))
        target = exponential_tilt(self.beta, self.sampling.limits(start))
        if self.control_from == 0:
            return target
        since = f"t = {self.control_from:g}"
        if self.early == "self-distillation":
            slow = f"Between modes that are apart at {since} already, it takes many rounds of self-distillation to move weight."
            return replace(target, caveats=(*target.caveats, slow))
        untilted = (
            f"Before {since} nothing is learned: what the base has settled by then, such as the mode of a sample, stays as"
            " likely as it was, and only what comes after is tilted."
        )
        return replace(
            target,
            words=f"p_base(x) exp(r(x) / beta) given the state at {since}, whose law is the base's",
            caveats=(*target.caveats, untilted),
            temperature=None,
            exact=lambda base, reward: late_control(base, reward, self.beta, self.control_from),
            reaches="none",
        )

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> State:
        """The state that is kept between iterations."""
        return State()

    def gradients(self, batch: Batch, state: State) -> Iterator[dict[str, float]]:
        """One iteration of the algorithm: yields once for each of `num_passes` optimizer steps, its gradient accumulated.

        Args:
            state: kept between iterations; changed in place.
        """
        chain = self.chain(batch.start)
        path, chosen = self._draw(batch, chain)
        first, late = int(torch.stack(chosen).min()), self._first_controlled(chain)
        right = memoryless_offset(chain.times + chain.times.diff()[0]) if self.pairing == "right" else None

        # residuals of the steps from `first` on, [steps, batch, *event]; both passes have already computed their parts
        batch.own_finite(path.velocities, "velocity", chain.times)
        shares, pool = None, self._pool(batch, chain, path)
        if pool is not None:
            shares, some = pool.weights, pool.which
            path = path.moved(lambda values: batch.own_of(values, some))
            batch, chosen = batch.select(some), [pairs[:, some] for pairs in chosen]
        regression, ends, rewards, terms, energy = self._adjoints(batch, chain, path, first, late, right)
        used = batch
        if (kept := finite_only(rewards)) is not None:
            used, rewards, ends, terms, energy = batch.select(kept), rewards[kept], ends[kept], terms[:, kept], energy[:, kept]
            chosen = [pairs[:, kept] for pairs in chosen]
            shares = None if shares is None else shares[kept] / shares[kept].sum()
        steps = slice(regression.first, len(path.velocities))
        batch.own_finite(regression.targets, "adjoint", chain.times[steps])
        if self.control_variate:
            terms[regression.first - first :] = self._without_noise_to_come(batch, chain, path, regression, kept)
        measured = {
            "reward": _mean(rewards, shares),
            "reward_std": _std(rewards, shares),
            "loss": _mean(terms[max(late - first, 0) :].sum(0), shares),
            "path_kl": _mean(energy.sum(0), shares) / 2,
            **({} if kept is None else {"dropped": float(len(batch) - len(kept))}),
        }
        measured |= used.learn(ends)

        def size_of(weights: Tensor) -> float:
            k = max(late - steps.start, 0)
            return _effective_size(batch.together(weights[k : k + 1], kept))

        for number, pairs in enumerate(chosen):
            in_loss = terms.gather(0, pairs - first)
            limits = self._limits(chain, pairs, in_loss, state)
            weights = suffix_weights(path, *batch.own_actor())[steps] if self.reweight_passes and number else None
            own = (pairs < late) & (self.early == "self-distillation")
            if own.any():
                begin, end = (chain.times[k].item() for k in (0, late))
                which, scale = own.nonzero()[:, 1], (end - begin) / late
                self_distillation(used, ends, which, self.sampling, end=end, scale=scale)
            self._regress(batch, chain, regression, pairs, limits, ~own, weights, shares, kept)
            yield {
                **measured,
                **({} if weights is None else {"effective_sample_size": size_of(weights)}),
                "clipped": (in_loss > limits).double().mean().item(),
            }

    def _draw(self, batch: Batch, chain: Chain) -> tuple[Trajectory, list[Tensor]]:
        """The trajectories of the samples of this process, and for each of `num_passes` the steps that enter the loss, of all
        samples, [count, batch]."""
        path = batch.own_paths(chain)
        chosen = [
            choose_timesteps(
                self.train_timesteps,
                len(path.velocities),
                self.num_inference_steps,
                len(batch),
                batch.generator,
                share=self._group_size(len(batch), alone=1),
            ).to(batch.x.device)
            for _ in range(self.num_passes)
        ]
        return path, chosen

    def _pool(self, batch: Batch, chain: Chain, path: Trajectory) -> Pool | None:
        """Which samples of a batch are learned from, if not all."""
        if self.pool is None:
            return None

        @torch.no_grad()
        def values(some: Batch, part: slice) -> tuple[Tensor]:
            last = len(path.velocities)
            end = path.states.of(batch.own_part(part))[last]
            if last < len(chain):  # the base takes this step
                end = chain.mean(last, end, some.base(end, chain.times[last]))
            return (evaluate(some.reward, end, some.non_finite),)

        (rewards,) = batch.map(values)
        return strata(rewards != 0, tail=self.pool.tail, body=self.pool.body, generator=batch.generator)

    def _group_size(self, batch: int, *, alone: int) -> int:
        """The number of samples in a row that share their steps; `alone` where none do."""
        if isinstance(self.share_timesteps, bool):
            return batch if self.share_timesteps else alone
        return self.share_timesteps

    def _first_controlled(self, chain: Chain) -> int:
        """The first step at or after `control_from`. Raises InputError if nothing is learned on one of its sides."""
        late = int(torch.searchsorted(chain.times[:-1], self.control_from - 1e-9))
        noisy = chain.times[:-1][chain.std > 0]
        if late and not self.control_from <= noisy[-1] + 1e-9:
            last = noisy[-1].item()
            raise InputError(
                f"method.control_from {self.control_from:g}: the last step with noise, and control, is at t = {last:.3g}"
            )
        places = [[round(edge * len(chain)) for edge in (each.start, each.end)] for each in self.train_timesteps or ()]
        if late and places and not min(places)[0] < late < max(end for _, end in places):
            raise InputError("method.train_timesteps: needs steps before control_from, and steps after it")
        return late

    @property
    def _needs_velocities(self) -> bool:
        """True if the velocities of the paths are needed after the adjoints too."""
        return self.control_variate or self.reweight_passes

    def _adjoints(
        self, batch: Batch, chain: Chain, path: Trajectory, first: int, late: int, right: Chain | None
    ) -> tuple[Regression, Tensor, Tensor, Tensor, Tensor]:
        """The regression of the steps from `first` on, with adjoints of zero before `late`; of the steps from `late` on alone
        if the others learn otherwise. Then the ends of the paths [batch, *event] and their rewards [batch]; and of all steps
        from `first` on the terms of the loss and |w_k|^2, [steps, batch]. Unless the velocities of the path are needed again,
        those of the base take their place.
        """
        begin = max(first, late) if self.early == "self-distillation" else first
        targets = batch.storage.new(len(path.velocities) - begin, batch.x[batch.own])
        of_base = None if self._needs_velocities else path.velocities[begin:]

        def adjoints(some: Batch, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            terms, energy = (some.x.new_empty(len(path.velocities) - first, len(some)) for _ in range(2))
            part = batch.own_part(part)
            states, own, targets_of = (each.of(part) for each in (path.states, path.velocities, targets))
            bases = None if of_base is None else of_base.of(part)
            gains, stds = (c.to(some.x) for c in (chain.control_scale, chain.std))

            @torch.no_grad()
            def taken(k: int, target: Tensor, v_base: Tensor) -> None:
                if k == len(path.velocities):  # the base takes this step
                    return
                gain, std = gains[k].to(v_base), stds[k].to(v_base)
                control = gain * (own[k] - v_base)
                energy[k - first] = control.flatten(1).square().sum(1)
                terms[k - first] = (control + std * target).flatten(1).square().sum(1)
                if k >= begin and bases is not None:
                    targets_of[k - begin], bases[k - begin] = target, v_base
                elif k >= begin:
                    targets_of[k - begin] = gain * v_base - std * target

            found = lean_adjoint(
                chain,
                some.base,
                states,
                some.objective,
                self.beta,
                pairing=self.pairing,
                reward_at=self.reward_at,
                first=max(first, late),
                right=right,
                tuned_velocities=own,
                bootstrap=self.bootstrap,
                tuned=(some.actor or some.tuned) if self.adjoint == "full" else None,
                non_finite=some.non_finite,
                taken=taken,
            )
            for k in range(first, late):
                with torch.no_grad():
                    taken(k, torch.zeros_like(states[k]), some.base(states[k], chain.times[k]))
            return found.end, found.rewards, terms, energy

        ends, rewards, terms, energy = batch.map(adjoints, dims=(0, 0, 1, 1))
        return Regression(path.states[begin:], of_base, targets, begin), ends, rewards, terms, energy

    @torch.no_grad()
    def _without_noise_to_come(
        self, batch: Batch, chain: Chain, path: Trajectory, regression: Regression, kept: Tensor | None
    ) -> Tensor:
        """Subtract from the residuals, by their targets and in place, what the noise to come predicts of them. Returns the
        terms of the loss of all samples that are kept."""
        terms, targets = [], regression.targets

        def subtract(row: int, residual: Tensor, noise: Tensor) -> Tensor:
            of_noise = predicted(residual[None], noise[None], lambda own: batch.together(own, kept))[0]
            targets[row] = targets[row] + of_noise
            return (residual - of_noise).flatten(1).square().sum(1)

        for k, noise in noise_to_come(path):
            if (row := k - regression.first) < 0:
                break
            gain = chain.control_scale[k].to(noise)
            terms.append(subtract(row, gain * path.velocities[k] - targets[row], noise))
        return batch.together(torch.stack(terms[::-1]), kept)

    def _limits(self, chain: Chain, pairs: Tensor, terms: Tensor, state: State) -> Tensor:
        """[count, batch]: the size above which each of the `terms` of the (step, sample) `pairs` [count, batch] is clipped or
        dropped; infinite where neither is asked for."""
        limits = torch.full_like(terms, float("inf"))
        if self.loss_clip is not None:
            h = chain.times.diff().to(terms)[pairs]
            limits = torch.minimum(limits, h * self.loss_clip / self.beta**2)
        if self.drop_quantile is not None:
            size = self._group_size(terms.shape[1], alone=terms.shape[1])
            for of_group, limit in zip(terms.split(size, 1), limits.split(size, 1), strict=True):
                quantile = torch.quantile(of_group.sqrt().flatten()[: 2**24], self.drop_quantile).item()
                seen = state.updates
                # the first two updates are a plain mean, then an exponential one, as in the authors' code
                decay = seen / (seen + 1) if seen < 2 else 0.9
                state.threshold = decay * state.threshold + (1 - decay) * quantile
                state.updates = seen + 1
                limit.clamp_(max=state.threshold**2)  # a view of `limits`
        return limits

    def _regress(
        self,
        batch: Batch,
        chain: Chain,
        regression: Regression,
        pairs: Tensor,
        limits: Tensor,
        used: Tensor,
        weights: Tensor | None,
        shares: Tensor | None,
        kept: Tensor | None,
    ) -> None:
        """Accumulate the gradient of the mean over the samples that are kept of sum_k W_k |w_k + s_k a|^2 over the `used` ones
        of the chosen (step, sample) pairs whose term is not above its limit, all [count, kept]; weights W of the samples of
        this process, [steps, own], or 1. The mean is that by the `shares` [kept], if samples have some."""
        size = len(batch) if kept is None else len(kept)
        k, limit, used = (batch.apart(each, kept) for each in (pairs, limits, used))
        used = (used & batch.counted(kept)).flatten()
        i = torch.arange(k.shape[1], device=k.device).expand_as(k).flatten()
        k, limit, tuned = k.flatten(), limit.flatten(), batch.tuned.select(batch.own)
        own_shares = None if shares is None else batch.apart(shares[None], kept)[0]

        def terms_of(part: Tensor) -> dict[str, Tensor]:
            kk, row, ii = k[part], k[part] - regression.first, i[part]
            x = regression.states.at(row, ii)
            gain, std = (expand(c.to(x.device)[kk], x) for c in (chain.control_scale, chain.std))
            v = tuned.select(ii)(x, chain.times.to(x.device)[kk])
            residual = regression.residual(v, gain, std, row, ii)
            terms = residual.flatten(1).square().sum(1)
            within = terms.detach() <= limit[part]
            if weights is not None:
                terms = weights[row, ii].to(terms) * terms
            if own_shares is not None:
                terms = size * own_shares[ii].to(terms) * terms
            return {"loss": within * terms}

        batch.accumulate_own(terms_of, used, over=size)


def _mean(values: Tensor, shares: Tensor | None) -> float:
    """The mean of values [batch], of samples that have these shares in it."""
    return float(values.mean() if shares is None else shares.to(values) @ values)


def _std(values: Tensor, shares: Tensor | None) -> float:
    """Their standard deviation."""
    if shares is None:
        return values.std(correction=0).item()
    return math.sqrt(_mean((values - _mean(values, shares)).square(), shares))


def _effective_size(weights: Tensor) -> float:
    """(sum w)^2 / sum w^2 of weights [batch]."""
    return float(weights.sum().square() / weights.square().sum())
