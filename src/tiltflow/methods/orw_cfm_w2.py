r"""ORW-CFM-W2: online reward-weighted conditional flow matching with a Wasserstein-2 penalty (Fan et al., arXiv 2502.06061).

The model learns from its own samples, each weighing more the higher its reward, and pays for leaving the base (eq. 10):

    loss = E[ w(x_1) |v(x_t, t) - (x_1 - x_0)|^2  +  alpha |v(x_t, t) - v_base(x_t, t)|^2 ],
    x_1 from the current model by its ODE,  x_0 fresh noise, independent of x_1,  x_t = t x_1 + (1 - t) x_0.

No gradient of the reward, no likelihood, no SDE. One round is

    1.  draw samples by the ODE, without gradients
    2.  weigh them by their rewards
    3.  regress: conditional flow matching on the weighted samples, and the penalty at the same (x_t, t).

The target law is not p_base exp(r / beta). With q the law of the samples and m(x, t) = E_q[w | x_t = x], the minimiser of one
round is lambda v_wq + (1 - lambda) v_base, where lambda = m / (m + alpha) and v_wq is the field of w q / E_q[w]. So

    alpha = 0     round n samples w^n p_base, exactly, and runs into the best mode as n grows
    alpha > 0     the rounds settle where that field samples q itself: a law that leans from p_base to high reward. To first
                  order in tau it is p_base exp(tau r / alpha), beyond that it is milder; `tiltflow.laws.induced_law` has it
    alpha -> inf  the base.

The laws are the same for every Gaussian path and every prediction type, as both terms are measured in the prediction of the
network. They depend on `weight_mode`:

    normalized  w / mean(w) in the first term. alpha means the same whatever the offset and scale of the reward. (default)
    raw         the paper's w. The effective penalty is alpha / E_q[w]: it shrinks as the reward grows, and changes with its
                offset. It reaches the same curve of laws as `normalized`, at other alphas.
    both-terms  w in both terms, so lambda = 1 / (1 + alpha) everywhere. The only one that has a fixed point for rewards that
                are not bounded above: for a Gaussian base and a linear reward exactly p_base exp(tau r / alpha).
"""

# Mutation tests: test_orw_cfm_w2.py

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tiltflow.data import load_images
from tiltflow.errors import CollapseError, InputError, did_you_mean
from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.flows.field import VelocityField
from tiltflow.flows.interpolant import expand
from tiltflow.laws.induced_law import fixed_point, mixture_of_rounds, one_round
from tiltflow.laws.law import Array, Law
from tiltflow.laws.target import Balance, Reach, Target
from tiltflow.methods import MethodSettings
from tiltflow.optimization import Numbers
from tiltflow.plugins import import_function
from tiltflow.rewards.functions.checked import finite_only
from tiltflow.samplers.grid import Start, spread_times
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling, SolverName
from tiltflow.settings import FunctionOrName, PathOrName
from tiltflow.streams import normal
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs
from tiltflow.training.noising import noising, shuffled
from tiltflow.training.scoring import Scoring, joined
from tiltflow.user_code import explained

Count = Annotated[int, Field(ge=1)]
WeightMode = Literal["normalized", "raw", "both-terms"]


@dataclass
class State(Numbers):
    """The number of rounds, and the data."""

    rounds: int = 0
    data: Tensor | None = None


class OrwCfmW2(MethodSettings):
    """ORW-CFM-W2. Any reward, no gradient; aims at its own law, near p_base(x) exp(tau r(x) / alpha) for a weak tilt."""

    name: Literal["orw-cfm-w2"] = "orw-cfm-w2"
    tau: Annotated[float, Field(gt=0)] = 1.0
    """Inverse temperature of the weights exp(tau r), in units of 1 / reward."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the Wasserstein penalty. With 0 the law never settles: after n rounds it is p_base exp(n tau r)."""
    weight: FunctionOrName = "exponential"
    """exponential: exp(tau r). reward: r itself, which must not be negative. Or `package.module:function`, your own
    function from rewards [batch] to weights [batch]."""
    weight_mode: WeightMode = "normalized"
    """normalized: weights of mean 1. raw: the weights themselves, as in the paper. both-terms: weights in the penalty too. The
    top of this file has their laws."""
    min_effective_sample_size: Annotated[float, Field(ge=1)] = 2.0
    """Stop when the effective number of samples of a round, (sum w)^2 / sum w^2, is less than this."""

    online_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the samples that come from the current model. 1 is online; 0 is offline (RW-CFM), whose law is w p_data. Between
    them, the rounds settle, with alpha = 0, at (1 - f) w p_data / (Z - f w)."""
    data: PathOrName | None = None
    """Source of the other samples: an .npz file with x_train, or a folder of images; the base by default."""
    solver: SolverName = "heun"
    """An ODE solver of `Sampling`, which draws the samples. The model learns them, so the error of the solver is learned again
    in every round: euler with few steps narrows the law a little more each time."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 20
    """Steps of the solver, from noise to data."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, more steps are near the noise; see `time_grid`. The times of the regression are spread in the same way."""

    coupling: Literal["independent", "optimal-transport"] = "independent"
    """How noise is paired with samples. optimal-transport pairs a batch at least cost, with weight_mode both-terms alone:
    samples are first drawn in proportion to their weights, as after pairing a weight would be that of the pair, and would no
    longer tilt the law."""
    num_passes: Count = 8
    """Optimizer steps on the samples of a round, each with fresh noise and times."""
    regression_batch_size: Count | None = None
    """Samples in each of these steps; by default all of the round."""

    @field_validator("weight")
    @classmethod
    def _known(cls, weight: str) -> str:
        if weight not in ("exponential", "reward") and ":" not in weight:
            raise ValueError(f"there is no weight {weight!r}{did_you_mean(weight, ['exponential', 'reward'])}")
        return weight

    @model_validator(mode="after")
    def _check(self) -> OrwCfmW2:
        if self.sampling.has_noise:
            raise ValueError(f"solver {self.solver!r} has noise, and the method needs the law of the ODE; use euler or heun")
        if self.coupling == "optimal-transport" and self.weight_mode != "both-terms":
            raise ValueError(
                "coupling 'optimal-transport' with weighted samples removes the tilt: each weight then belongs to a pair, whose"
                " noise is no longer Gaussian; use coupling 'independent', or weight_mode 'both-terms'"
            )
        if self.data is not None and self.online_fraction == 1:
            raise ValueError("data are not used while online_fraction is 1; give a smaller one")
        return self

    def learns_nothing(self, group: int) -> str | None:
        """See `MethodSettings`: the weight of a single sample, normalised, is 1 whatever its reward."""
        if group > 1 or self.weight_mode == "raw":
            return None
        return (
            "weights are normalised among the samples of a prompt, a class or a batch, and that of a single sample is always 1"
        )

    @property
    def needs(self) -> Needs:
        """Takes any reward; with data of its own, a model without conditions."""
        return Needs(own_data=self.data is not None, begins_as_base=True, passes=self.num_passes)

    @property
    def sampling(self) -> Sampling:
        """The sampler that draws samples from the model while it trains."""
        return Sampling(solver=self.solver, num_inference_steps=self.num_inference_steps, shift=self.shift)

    @property
    def temperature(self) -> float | None:
        """alpha / tau, to first order in tau; None where the rounds settle at no tilt."""
        settles = self.alpha > 0 and self.online_fraction == 1 and self.weight == "exponential"
        return self.alpha / self.tau if settles else None

    def at_temperature(self, beta: float) -> OrwCfmW2:
        """The same weights with the penalty alpha = tau beta."""
        return self.model_copy(update={"alpha": self.tau * beta})

    def tilt(self, rounds: float) -> float:
        """c such that the law after this many rounds is p_base exp(c r): tau sum_{k=1..n} (1 + alpha)^-k. Exact for alpha = 0
        and exponential weights, otherwise to first order in tau. Offline there is only one round."""
        if self.online_fraction == 0:
            rounds = 1
        decay: float = 1 / (1 + self.alpha)
        if self.online_fraction == 0 or decay == 1:
            return self.tau * decay * rounds
        return self.tau * decay * (1 - float(decay**rounds)) / (1 - decay)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """The base tilted by a power of the weights: the law of a run of this many optimizer steps, exactly or to first order
        in tau; the caveats say which."""
        rounds = math.ceil(steps / self.num_passes)
        tilt, settles = self.tilt(rounds), self.alpha > 0 and self.online_fraction == 1
        power, exponential = tilt / self.tau, self.weight == "exponential"

        def log_tilt(rewards: Tensor) -> Tensor:
            return power * self.log_weights(rewards)

        only_rounds = self.alpha == 0 and self.online_fraction == 1 and exponential
        return Target(
            log_tilt=log_tilt,
            words=f"p_base(x) exp({tilt:.3g} r(x))" if exponential else f"p_base(x) w(x)^{power:.3g}",
            caveats=tuple(self._caveats()),
            temperature=1 / float(log_tilt(torch.ones(1))) if only_rounds else None,
            exact=partial(self._exact_law, steps=steps),
            # expected if each round is fitted perfectly
            balance=Balance(self.balance, 1 / (1 - float((1 + self.alpha) ** -rounds))) if settles else None,
            reaches=self._reaches(),
        )

    def _reaches(self) -> Reach:
        """See `Target`: rounds without a penalty, and the one round of the base's own samples, are exponential tilts."""
        if self.weight != "exponential" or self.data is not None or 0 < self.online_fraction < 1:
            return "none"
        return "exact" if self.alpha == 0 else "first-order"

    def _exact_law(self, base: Law, reward: Callable[[Array], Array], steps: int) -> Law:
        """The law after this many optimizer steps, in one dimension, if each round is fitted perfectly; the law at which the
        rounds settle if they do so before. Raises ValueError if alpha > 0 and some samples are not of the current model.

        Args:
            reward: points [n] -> their rewards [n].
        """

        def log_weight(x: Array) -> Array:
            return self.log_weights(torch.from_numpy(reward(x))).numpy()

        if self.online_fraction == 0:
            return one_round(base, base, log_weight, self.alpha, self.weight_mode)
        if self.online_fraction < 1:
            if self.alpha > 0:
                raise ValueError("with alpha > 0 and part of the samples from elsewhere no exact law is known")
            return mixture_of_rounds(base, log_weight, self.online_fraction)
        rounds = math.ceil(steps / self.num_passes)
        if self.alpha == 0:
            return base.tilt(rounds * log_weight(base.points))
        return fixed_point(base, log_weight, self.alpha, self.weight_mode, rounds=rounds)

    @torch.no_grad()
    def balance(
        self,
        tuned: VelocityField,
        base: VelocityField,
        x1: Tensor,
        rewards: Tensor,
        generator: torch.Generator,
        *,
        start: Start = 0.0,
        draws: int = 8,
        batch_size: int | None = None,
    ) -> Estimate | None:
        """The pull of the reward over the penalty: 1 at the law at which the rounds settle.

        There the derivative of the loss vanishes in every direction, so also along what was learned, d = v - v_base:
        E[w (x_1 - x_0 - v) . d] = alpha E|d|^2. The estimate is the left side over the right one, with the standard error over
        samples. Above 1, at b, the model is still on its way, and has made 1 / b of the displacement: exactly for a Gaussian
        base, a linear reward and both-terms, otherwise to first order in tau. Below 1 it has moved further than the reward
        pulls, by overshooting or by noise: of the fit, or of rounds with few samples, whose law drifts.

        Args:
            x1: samples of `tuned` [batch, *event].
            rewards: their rewards [batch].
            draws: draws of noise and time for each sample.

        Returns None without a penalty, with samples that are not of the model, or where nothing was learned.
        """
        if self.alpha == 0 or self.online_fraction < 1:
            return None
        weights = self.weights(rewards).double()
        pull, leash = torch.zeros_like(weights), torch.zeros_like(weights)
        for _ in range(draws):
            for i in torch.arange(len(x1), device=x1.device).split(batch_size or len(x1)):
                x0 = tuned.select(i).project(normal(x1[i].shape, generator, x1.dtype))
                uniform = torch.rand(len(i), generator=generator, device=x1.device, dtype=torch.float64)
                t = spread_times(uniform, start=self.sampling.times(start)[0].item(), shift=self.shift)
                x = expand(1 - t, x0) * x0 + expand(t, x0) * x1[i]
                v = tuned.select(i)(x, t)
                d = v - base.select(i)(x, t)
                scale = tuned.prediction_scale(t).double() ** 2
                pull[i] += scale * ((x1[i] - x0 - v) * d).flatten(1).sum(1).double()
                leash[i] += scale * d.flatten(1).square().sum(1).double()
        pull = weights * pull
        leash = self.alpha * (weights if self.weight_mode == "both-terms" else 1) * leash
        if not float(leash.mean()) > 0:
            return None
        balance = pull.mean() / leash.mean()
        # normalised weights are divided by their mean, so a weight that is drawn too large shrinks all others
        own_mean = weights - 1 if self.weight_mode == "normalized" else torch.zeros_like(weights)
        influence = pull / leash.mean() - balance * (leash / leash.mean() + own_mean)
        return Estimate(balance.item(), (influence.std() / math.sqrt(len(x1))).item())

    def _caveats(self) -> list[str]:
        """Reasons why the law is not p_base exp(r / beta), one sentence each."""
        reasons = []
        if self.alpha == 0 and self.online_fraction == 1:
            reasons.append("alpha = 0: every round tilts the law again, until one mode is left; there is no target to stop at.")
        if self.alpha > 0:
            reasons.append(
                "With alpha > 0 the law of ORW-CFM-W2 is no exponential tilt: the tilted law that it is compared with is its"
                " own to first order in tau, and what it reaches beyond that is milder."
            )
        if self.weight != "exponential":
            reasons.append("The weights are not exp(tau r), so the law is not an exponential tilt.")
        if 0 < self.online_fraction < 1:
            reasons.append(
                "Part of the samples is not of the current model: the law is a hyperbolic tilt, not an exponential one."
            )
        return reasons

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> State:
        """The state that is kept between rounds. Raises InputError if the data cannot be read or are of another shape."""
        if self.data is None:
            return State()
        images = load_images(self.data).images.to(device)
        if images.shape[1:] != event_shape:
            raise InputError(f"method.data: images of shape {list(images.shape[1:])}, but samples of {list(event_shape)}")
        return State(data=images)

    def gradients(self, batch: Batch, state: State) -> Iterator[dict[str, float]]:
        """One round of the algorithm: yields once for each of `num_passes` optimizer steps, its gradient accumulated. A round
        draws as many samples as the batch has starting points. Where the flow is bound to conditions, weights are normalised
        among the samples of each condition.

        Args:
            state: kept between rounds; changed in place.

        Raises InputError for weights that are negative or infinite, and, in the first round, for a reward that is the same for
        all samples; CollapseError if too few samples carry the weight.
        """
        size = len(batch)
        with Scoring(batch) as scoring:
            x1 = self._samples(batch, state, scoring)
            rewards = scoring.rewards()
        if (kept := finite_only(rewards)) is not None:
            x1, rewards, batch = x1[kept], rewards[kept], batch.select(kept)
        if state.rounds == 0 and len(rewards) > 1 and bool((rewards == rewards[0]).all()):
            raise InputError(
                f"the reward is {rewards[0].item():g} for all {len(rewards)} samples: there is nothing to learn from it"
            )
        weights = self.weights(rewards, batch.tuned.groups(len(rewards), rewards.device))
        state.rounds += 1
        effective = ImportanceWeights(weights.double() / weights.double().sum()).effective_sample_size
        if effective < self.min_effective_sample_size:
            raise CollapseError(
                f"round {state.rounds}: the weights of {len(weights)} samples rest on {effective:.1f} of them (largest weight"
                f" {weights.max().item():.3g}, rewards {rewards.min().item():.3g} to {rewards.max().item():.3g}): lower"
                f" method.tau ({self.tau:g}), or raise training.train_batch_size"
            )
        measured = {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            "effective_sample_size": effective,
            "largest_weight": weights.max().item(),
            **({} if kept is None else {"dropped": float(size - len(kept))}),
        }
        for _ in range(self.num_passes):
            yield {**measured, **self._regress(batch, x1, weights)}

    @torch.no_grad()
    def _samples(self, batch: Batch, state: State, scoring: Scoring) -> Tensor:
        """The samples of a round [batch, *event]: first those of the current model, then those of the data or the base."""
        generator, online = batch.generator, round(self.online_fraction * len(batch))

        def of(flow: VelocityField, which: slice) -> list[Tensor]:
            acting = batch.whole(batch.guide(flow) if batch.guide else flow).select(which)
            x = batch.x[which]
            return scoring.drawn(
                len(x),
                generator,
                lambda part, noise: sample(acting.select(part), x[part], self.sampling, noise, start=batch.start),
            )

        parts = []
        if online:
            parts += of(batch.actor or batch.tuned, slice(online))
        if online < len(batch):
            if state.data is None:
                parts += of(batch.base, slice(online, None))
            else:
                which = torch.randint(len(state.data), (len(batch) - online,), generator=generator, device=generator.device)
                parts.append(state.data[which].to(batch.x))
                scoring.add(parts[-1])
        return joined(parts)

    def weights(self, rewards: Tensor, members: list[Tensor] | None = None) -> Tensor:
        """Weights [batch] for rewards [batch], of mean 1 unless they are raw.

        Args:
            members: indices of each group of samples among which weights are normalised; one group of all by default.

        Raises InputError if one is negative or infinite, or all are zero.
        """
        logs = self.log_weights(rewards)
        if self.weight_mode == "raw":
            weights = logs.exp()
        else:
            weights = torch.empty_like(logs)
            for group in members or [torch.arange(len(logs), device=logs.device)]:
                weights[group] = torch.softmax(logs[group], 0) * len(group)
        if bool(weights.isnan().any()) or float(weights.sum()) == 0:
            raise InputError(f"method.weight {self.weight}: the weights of {len(weights)} samples are all zero")
        if bool(weights.to(rewards.dtype).isinf().any()):
            raise InputError(
                f"method.weight {self.weight}: the largest weight is infinite (rewards up to {rewards.max().item():g},"
                f" method.tau {self.tau:g}); lower tau, or use weight_mode normalized"
            )
        return weights.to(rewards.dtype)

    def log_weights(self, rewards: Tensor) -> Tensor:
        """log w [batch], float64, for rewards [batch]. Raises InputError if a weight is negative or not a number."""
        if self.weight == "exponential":
            return self.tau * rewards.double()
        raw: Any = rewards
        if self.weight != "reward":
            function = import_function(self.weight, "method.weight")
            with explained(f"method.weight {self.weight}"):
                raw = function(rewards.clone())
            if not isinstance(raw, Tensor) or raw.shape != rewards.shape:
                shape = list(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
                raise InputError(f"method.weight {self.weight}: must return weights {list(rewards.shape)}, got {shape}")
        if not bool((raw >= 0).all()):
            hint = "; subtract its lower bound from the reward, or use weight exponential" if self.weight == "reward" else ""
            raise InputError(f"method.weight {self.weight}: a weight is {raw.min().item():g}, it must not be negative{hint}")
        logs: Tensor = raw.double().log()
        return logs

    def _regress(self, batch: Batch, x1: Tensor, weights: Tensor) -> dict[str, float]:
        """Accumulate the gradient of the loss over samples x1 [batch, *event], with fresh noise and times."""
        generator, pair = batch.generator, None
        size = self.regression_batch_size or len(x1)
        if self.coupling == "independent":
            which = shuffled(len(x1), size, generator)
            of_fit, of_penalty = (
                weights[which],
                weights[which] if self.weight_mode == "both-terms" else torch.ones_like(weights[which]),
            )
        else:
            pair, which = cheapest_pairing, torch.multinomial(weights, size, replacement=True, generator=generator)
            of_fit = of_penalty = torch.ones_like(weights[which])
        pairs = noising(batch.tuned, x1, which, self.sampling, generator, start=batch.start, pair=pair)

        def terms_of(part: slice) -> dict[str, Tensor]:
            i, x, s, u = pairs.points(part)
            v = batch.tuned.select(i)(x, s)
            # measured in the network's own prediction, errors near the ends of the path have the weight that they had in
            # pretraining
            scale = batch.tuned.prediction_scale(s).to(x) ** 2 / x[0].numel()
            misfit = scale * (v - u).flatten(1).square().sum(1)
            terms = {"loss": of_fit[part] * misfit, "flow_matching_loss": misfit.detach()}
            if self.alpha > 0:
                with torch.no_grad():
                    origin = batch.base.select(i)(x, s)
                away = (v - origin).flatten(1).square().sum(1)
                terms["loss"] = terms["loss"] + self.alpha * of_penalty[part] * scale * away
                terms["velocity_distance"] = away.detach()
                if self.online_fraction == 1:
                    terms["kl"] = pairs.kl_weights[part] * away.detach()
            return terms

        return batch.accumulate(terms_of, size, over=size)


def cheapest_pairing(x0: Tensor, x1: Tensor) -> Tensor:
    """Indices [batch] into x0 [batch, *event] that pair it with x1 at the least sum of squared distances."""
    cost = torch.cdist(x1.flatten(1).double(), x0.flatten(1).double()).square()
    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1]).to(x0.device)
