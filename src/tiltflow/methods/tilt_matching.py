r"""Tilt Matching (arXiv 2512.21829), and the family of forward-process regressions that it belongs to.

No gradient of the reward, no likelihood, no SDE. Round after round the inverse temperature eta of the laws p_base exp(eta r)
rises to 1 / beta. One round is

    1.  draw samples x_1 by the ODE of the model, without gradients, and their rewards
    2.  choose the next eta: as far as the samples, weighted by exp(h r), h the rise, are still worth a share of their number
    3.  regress: steps of v at x_t = t x_1 + (1 - t) x_0, x_0 fresh noise, towards v + d, held fixed, with

            d = a (v_anchor - v) + c (u - v_residual),     u = x_1 - x_0.

With W the weight of x_1 under the law of the next eta, A its weight under that of the anchor, a = s A and c = W - a,

    d = W (u - v) - s A (u - v_anchor),

whose mean given x_t vanishes for v the field of the next law: E[W (u - v)] = 0 there, and E[A (u - v_anchor)] = 0 for the
field of the anchor's own law. So every round is exact, and the second term, a control variate, is there to cancel noise: most
of it for s = E[W A] / E[A^2], which is 1 for the samples of the anchor's law, and falls as the two laws part. But where W is
small little pulls v to its place, and the same noise does more: relative to W, it is least for s = 1 / E[A^2 / W], which
minimises E[(W - s A)^2 / W]. Of a mode that the tilt all but empties this leaves a field that is as good as elsewhere
(`anchor_share`). The weights
follow from the rewards alone, for samples of this round and of earlier ones together (`tiltflow.laws.exponential_family`).
Where W = A = 1, as for a reward that is constant, d is zero at the anchor, sample by sample: what the model does not do
perfectly is left as it is, and not learned again from its own samples.

    anchor old, own samples     a = 1, c = W - 1: implicit tilt matching as published. Errors of the rounds add up.
    anchor base, own samples    A = exp(-eta r) / mean: the reverse form. It corrects what earlier rounds got wrong, the less
                                so the further eta is: for some rewards E exp(-eta r) does not exist.
    anchor base, earlier ones   both, and A is bounded, as samples of the base itself are among them. (default)
    anchor none                 a = 0, c = W: reward weighting, the same laws with far more noise: it grows with the square of
                                the number of rounds.

With coefficient `linear` a = 1 and c = h (r - mean r), h the rise, or all of eta around the base: quadratures of

    d v / d eta = Cov(r, u | x_t)

with the whole step at one end of it, which other papers take. Their laws are not the tilt; the presets say which.
"""

# Mutation tests: test_tilt_matching.py

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow import processes
from tiltflow.errors import CollapseError, InputError
from tiltflow.flows.field import VelocityField
from tiltflow.flows.interpolant import expand
from tiltflow.laws.exponential_family import Pooled, effective_share, next_tilt, tilt_of
from tiltflow.laws.forward_process import Residual, ram
from tiltflow.laws.law import Law
from tiltflow.laws.target import Reach, RewardAt, Target, exponential_tilt
from tiltflow.methods import Positive, Tempered, from_preset
from tiltflow.rewards.functions.checked import finite_only
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling, SolverName
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs
from tiltflow.training.noising import noising, resampled, smoothed
from tiltflow.training.replay import Recalled, Replay
from tiltflow.training.scoring import Scoring, joined

Count = Annotated[int, Field(ge=1)]
Which = Literal["current", "old", "base"]

POLE = -0.9
"""The least c of a linear coefficient around the network itself: at -1 the regression has no minimum."""

OWN: dict[str, Any] = {"replay": 1, "neighbours": 1}
LINEAR: dict[str, Any] = {**OWN, "coefficient": "linear"}
PRESETS: dict[str, dict[str, Any]] = {
    "implicit": {**OWN, "anchor": "old"},
    "reverse": {**OWN, "anchor": "base"},
    "reward-weighting": {**OWN, "anchor": "none"},
    "explicit": {**LINEAR, "anchor": "old", "residual": "old"},
    "ram": {**LINEAR, "target_effective_sample_size": 0.0, "num_passes": 8},
    "awm": {**LINEAR, "target_effective_sample_size": 0.0, "num_inference_steps": 14},
    "adrpo": {**LINEAR, "target_effective_sample_size": 0.0, "residual": "base"},
    "nft": {**LINEAR, "anchor": "old", "residual": "old", "standardize": True, "advantage_clip": 5.0, "fixed_rise": 0.2},
}
REACHES: dict[str, tuple[Reach, str]] = {
    "explicit": (
        "first-order",
        "Each round is one explicit step of the tilting identity: the law is the tilt up to an error of order 1 / rounds.",
    ),
    "current": (
        "first-order",
        "The advantage is taken once, linearly and at the end of the way: the law is the tilt to first order in 1 / beta, and"
        " milder beyond. Advantages below -0.9 beta are clipped, as the regression has no minimum there.",
    ),
    "base": (
        "first-order",
        "The advantage is taken once, linearly and around the base: the law is the tilt to first order in 1 / beta, and exactly"
        " for a linear reward on a Gaussian, in the first round alone.",
    ),
    "nft": ("none", "Every round tilts the law again, and nothing pulls it back: there is no law at which this settles."),
}


class Aims(NamedTuple):
    """a and c of each sample [n], float64."""

    pull: Tensor
    gain: Tensor


@dataclass
class State:
    """The inverse temperature that the model is at, and the one that this round aims at; whether the next round draws from the
    base; the samples that are kept; the weights at the start of the round, where they are needed."""

    device: torch.device
    tilt: float = 0.0
    aim: float = 0.0
    from_base: bool = False
    batches: int = 0
    old: list[Tensor] = field(default_factory=list)
    replay: Replay = field(default_factory=Replay)

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        numbers = {"tilt": self.tilt, "aim": self.aim, "from_base": self.from_base, "batches": self.batches}
        return {**numbers, "old": self.old, "replay": self.replay.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.tilt, self.aim, self.batches = state["tilt"], state["aim"], state["batches"]
        self.from_base = state.get("from_base", False)  # which earlier versions did not have
        self.old = [values.to(self.device) for values in state["old"]]
        self.replay.load_state_dict(state["replay"], self.device)


class TiltMatching(Tempered):
    """Tilt Matching. Any reward, no gradient; aims at p_base(x) exp(r(x) / beta)."""

    name: Literal["tilt-matching"] = "tilt-matching"
    preset: Literal["implicit", "reverse", "reward-weighting", "explicit", "ram", "awm", "adrpo", "nft"] | None = None
    """Start from a published setting; keys given beside it win. The tilt in any number of rounds: implicit (as published),
    reverse, reward-weighting. The tilt as the number of rounds grows: explicit. To first order in 1 / beta: ram, awm, adrpo. No
    law: nft, without a penalty."""

    coefficient: Literal["exponential", "linear"] = "exponential"
    """How much a sample counts: by its weight exp(h r), or by h (r - mean r)."""
    anchor: Literal["base", "old", "none"] = "base"
    """The field that a round starts from: that of the base, of the last round, or none, which is reward weighting."""
    anchor_share: Literal["least-noise", "least-relative-noise"] = "least-noise"
    """The share of the anchor's term in the target: that which leaves the least noise, or the least relative to the weights of
    the next law, for modes that a strong tilt all but empties."""
    residual: Which = "current"
    """What the velocity of a sample is compared with: the network as it is, or as it was in the last round, or the base."""
    target_effective_sample_size: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """Share of the samples of a round that their weights toward the next inverse temperature must be worth: it sets how fast
    that rises. With 0 it is 1 / beta at once."""
    proposal: Literal["tuned", "auto"] = "tuned"
    """Whose samples a round draws: the tuned model's; with auto the base's, as long as these, weighted toward 1 / beta, are
    worth `target_effective_sample_size` of their number. They have no errors of earlier rounds."""
    fixed_rise: Positive | None = None
    """Instead, raise the inverse temperature by this in each round, without end."""
    batches_per_round: Count = 1
    """Batches in a round. With more than one, all are drawn from the weights at its start: for models with prompts, whose batch
    is too small to fit a round on."""
    replay: Count = 8
    """Batches whose samples are kept and learned from again: the first one, of the base, and the latest. Those of other
    conditions wait until these come again. 1: each batch is used once."""
    neighbours: Count = 256
    """Samples whose mean, weighted by how likely each of them ends at x_t, stands for the one that x_t was made from: the same
    target with less noise near the start of the path (arXiv 2302.00670). 1 for none."""
    standardize: bool = False
    """Divide linear advantages by their standard deviation in the batch."""
    advantage_clip: Positive | None = None
    """Clip linear advantages at this and at minus this."""
    min_effective_sample_size: Annotated[float, Field(ge=1)] = 2.0
    """Stop when the weights of a batch rest on fewer samples than this."""

    solver: SolverName = "heun"
    """An ODE solver of `Sampling`, which draws the samples."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 20
    """Steps of the solver, from noise to data."""
    shift: Positive = 1.0
    """Above 1, more steps are near the noise; see `time_grid`. The times of the regression are spread in the same way."""
    num_passes: Count = 16
    """Optimizer steps on each batch, each with fresh noise and times."""
    regression_batch_size: Count | None = None
    """Samples in each of these steps; by default as many as the batch has."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        return from_preset(PRESETS, values)

    @model_validator(mode="after")
    def _check(self) -> TiltMatching:
        if self.sampling.has_noise:
            raise ValueError(f"solver {self.solver!r} has noise, and the method needs the law of the ODE; use euler or heun")
        if self.coefficient == "linear":
            if self.replay > 1:
                raise ValueError("coefficient 'linear' has no weights for samples of earlier batches; use replay 1")
            if self.anchor == "none":
                raise ValueError("coefficient 'linear' needs an anchor: advantages of both signs have no mean velocity")
        elif self.standardize or self.advantage_clip is not None or self.fixed_rise is not None:
            raise ValueError("standardize, advantage_clip and fixed_rise belong to coefficient 'linear'")
        if self.proposal == "auto" and self.coefficient == "linear":
            raise ValueError("coefficient 'linear' learns from the samples of the model; use proposal 'tuned'")
        return self

    def learns_nothing(self, group: int) -> str | None:
        """See `MethodSettings`: a single sample has nothing to be better than."""
        if group > 1:
            return None
        return "rewards are compared among the samples of a prompt, a class or a batch, and a single one has no other"

    @property
    def needs(self) -> Needs:
        """Takes any reward."""
        return Needs(begins_as_base=True, passes=self.num_passes, batches_kept=self.replay)

    @property
    def sampling(self) -> Sampling:
        """The sampler that draws samples from the model while it trains."""
        return Sampling(solver=self.solver, num_inference_steps=self.num_inference_steps, shift=self.shift)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """p_base exp(r / beta), and how near to it this member of the family comes."""
        if self.coefficient == "exponential" and self.residual == "current":
            return exponential_tilt(self.beta)
        kind = "nft" if self.fixed_rise is not None else "explicit" if self.anchor == "old" else self.residual
        reaches, caveat = REACHES["explicit" if kind == "old" else kind]
        target = exponential_tilt(self.beta, [caveat], reaches)
        settles = self.coefficient == "linear" and self.anchor == "base" and self.fixed_rise is None
        return replace(target, exact=self._settled_law) if settles else target

    def _settled_law(self, base: Law, reward: RewardAt) -> Law:
        """The law at which rounds with linear advantages around the base settle, on the line. Raises ValueError where none is
        known."""
        if self.standardize or self.advantage_clip is not None:
            raise ValueError("with standardize or advantage_clip no exact law is known")
        residual: Residual = "anchor" if self.residual == "base" else "network"
        return ram(base, reward, self.beta, residual, lowest=POLE if self.residual == "current" else -math.inf)

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> State:
        """The state that is kept between batches."""
        return State(device)

    def gradients(self, batch: Batch, state: State) -> Iterator[dict[str, float]]:
        """One batch of a round: yields once for each of `num_passes` optimizer steps, its gradient accumulated. Weights and
        advantages are normalised among the samples of each condition.

        Args:
            state: kept between batches; changed in place.

        Raises InputError if all rewards of the first batch are equal; CollapseError if too few samples carry the weight.
        """
        begins = state.batches % self.batches_per_round == 0
        if begins and (self.batches_per_round > 1 or "old" in (self.anchor, self.residual)):
            with (batch.actor or batch.tuned).own_weights():
                state.old = batch.copy_of_weights()
        size = len(batch)
        with Scoring(batch) as scoring:
            x1 = self._samples(batch, state, scoring)
            rewards = scoring.rewards()
        if (kept := finite_only(rewards)) is not None:
            x1, rewards, batch = x1[kept], rewards[kept], batch.select(kept)
        constant = bool((rewards == rewards[0]).all())
        if state.batches == 0 and constant and len(rewards) > 1:
            raise InputError(
                f"the reward is {rewards[0].item():g} for all {len(rewards)} samples: there is nothing to learn from it"
            )
        of_base = state.from_base
        if begins and self.replay > 1 and state.tilt and not of_base and not constant:
            state.tilt = self._measured(rewards, batch, state)
        tilt = 0.0 if of_base else state.tilt
        recalled = state.replay.add(x1, rewards, tilt, batch.tuned, self.replay)
        if begins:
            reached = tilt if constant else self._next(rewards, batch, state, tilt)
            state.from_base = self.proposal == "auto" and tilt == 0 and reached == 1 / self.beta
            state.aim = 1 / self.beta if of_base else reached
        aims, measured = self._aims(recalled, state)
        mean, std = moments(rewards, (aims.pull + aims.gain)[-len(rewards) :] if of_base else None)
        measured = {
            "reward": mean,
            "reward_std": std,
            "inverse_temperature": state.aim,
            "tilt_step": state.aim - state.tilt,
            **measured,
            **({} if kept is None else {"dropped": float(size - len(kept))}),
        }
        present = batch.select(recalled.where)
        for _ in range(self.num_passes):
            yield {**measured, **self._regress(present, recalled, aims, state, size)}
        state.batches += 1
        if state.batches % self.batches_per_round == 0:
            state.tilt, state.old = state.aim, []

    def _samples(self, batch: Batch, state: State, scoring: Scoring) -> Tensor:
        """Samples of the model as it is at the start of the round, or of the base [batch, *event]."""
        tuned = self._old(batch, state) if self.batches_per_round > 1 else batch.actor or batch.tuned
        flow = batch.base if state.from_base else tuned
        acting = batch.whole(batch.guide(flow) if batch.guide else flow)
        return joined(
            scoring.drawn(
                len(batch),
                batch.generator,
                lambda part, noise: sample(acting.select(part), batch.x[part], self.sampling, noise, start=batch.start),
            )
        )

    @staticmethod
    def _old(batch: Batch, state: State) -> VelocityField:
        """The model as it is at the start of the round."""
        return batch.tuned_at([processes.part_like(w, p) for w, p in zip(state.old, batch.parameters, strict=True)])

    @staticmethod
    def _measured(rewards: Tensor, batch: Batch, state: State) -> float:
        """The inverse temperature of the law that the samples are of: less than their round aimed at, where it did not fit. By
        their mean reward, beside earlier samples; as aimed at where none of the same conditions have rewards that differ."""
        earlier = state.replay.earlier(batch.tuned, len(rewards), rewards.device)
        group, tilts, values = (
            torch.cat(each).cpu() for each in zip(*((e.group, e.tilts, e.rewards) for e in earlier), strict=True)
        )
        known = []
        for number, own in enumerate(batch.tuned.groups(len(rewards), rewards.device)):
            before = values[group == number]
            if len(before.unique()) > 1:  # equal rewards have the same mean at every tilt
                family = Pooled.of(before, tilts[group == number])
                known.append((family, family.within(rewards[own]).mean().item()))
        return tilt_of(known, state.tilt) if known else state.tilt

    def _next(self, rewards: Tensor, batch: Batch, state: State, tilt: float) -> float:
        """The inverse temperature that the round aims at, whose samples are of the law at `tilt`."""
        if self.fixed_rise is not None:
            return tilt + self.fixed_rise
        of_groups = [rewards[members].double().cpu() for members in batch.tuned.groups(len(rewards), rewards.device)]
        try:
            return next_tilt(of_groups, tilt, 1 / self.beta, self.target_effective_sample_size)
        except ValueError as error:
            raise CollapseError(
                f"batch {state.batches + 1}: {error} of {len(rewards)} samples (rewards {rewards.min().item():.3g} to"
                f" {rewards.max().item():.3g}); lower method.target_effective_sample_size, or bound the reward"
            ) from None

    def _aims(self, recalled: Recalled, state: State) -> tuple[Aims, dict[str, float]]:
        """a and c of each sample, and what is known of the law that is aimed at.

        Raises CollapseError if too few samples carry the weight.
        """
        count = len(recalled.rewards)
        pull, weights, gain = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
        divergence = 0.0
        for members in (each.cpu() for each in recalled.groups):
            rewards = recalled.rewards.cpu()[members]
            if self.coefficient == "linear":
                pull[members], gain[members] = 1.0, self._advantages(rewards) * self._rise(state)
                continue
            family = Pooled.of(rewards, recalled.tilts[members])
            weights[members] = family.weights(state.aim)
            if self.anchor != "none":
                of_anchor = family.weights(state.tilt if self.anchor == "old" else 0.0)
                pull[members] = of_anchor * self._share(weights[members], of_anchor)
            gain[members] = weights[members] - pull[members]
            divergence += family.divergence(state.aim) / len(recalled.groups)
        if self.coefficient == "linear":
            return Aims(pull, gain), {"largest_weight": (1 + gain).abs().max().item()}
        for which, some in (("next law", weights), ("anchor", pull)):
            effective = effective_share(some) * count if some.any() else float("inf")
            if effective < self.min_effective_sample_size:
                raise CollapseError(
                    f"batch {state.batches + 1}: the weights of the {which} rest on {effective:.1f} of {count} samples (largest"
                    f" {some.max().item():.3g}): raise training.train_batch_size or method.replay, or use anchor 'old'"
                )
        found = {"effective_sample_size": effective_share(weights) * count, "largest_weight": weights.max().item()}
        return Aims(pull, gain), found | ({"kl": divergence} if state.aim == 1 / self.beta else {})

    def _share(self, weights: Tensor, of_anchor: Tensor) -> float:
        """s: how much of the anchor's term cancels most noise, as of any control variate.

        Args:
            weights, of_anchor: W and A of the samples of a condition [n], float64, of mean 1.
        """
        if self.anchor_share == "least-noise":
            return float((weights * of_anchor).mean() / of_anchor.square().mean())
        some = of_anchor > 0  # where both are 0 there is nothing to cancel
        return len(weights) / float((of_anchor[some].square() / weights[some]).sum())

    def _rise(self, state: State) -> float:
        """The inverse temperature between the anchor and the aim."""
        return state.aim - (state.tilt if self.anchor == "old" else 0.0)

    def _advantages(self, rewards: Tensor) -> Tensor:
        """r - mean r of the samples of a condition, as `standardize` and `advantage_clip` have it."""
        advantages = rewards - rewards.mean()
        if self.standardize and float(std := advantages.std(correction=0)) > 0:
            advantages = advantages / std
        return advantages if self.advantage_clip is None else advantages.clamp(-self.advantage_clip, self.advantage_clip)

    def _regress(self, batch: Batch, recalled: Recalled, aims: Aims, state: State, size: int) -> dict[str, float]:
        """Accumulate the gradient of E|v - sg(v + d)|^2, with fresh noise and times.

        Args:
            batch: bound to the conditions of the samples that are recalled.
            size: how many samples the present batch has.
        """
        size = self.regression_batch_size or size
        gain = aims.gain.clamp(min=POLE) if self.coefficient == "linear" and self.residual == "current" else aims.gain
        share = aims.pull + gain.abs()  # samples of no weight under both laws are not drawn, and no weight is large
        which = resampled(share.to(recalled.x.device), size, batch.generator)
        pairs = noising(batch.tuned, recalled.x, which, self.sampling, batch.generator, start=batch.start)
        drawn = which.cpu()
        pull, gain = ((each[drawn] * share.mean() / share[drawn]).to(which.device) for each in (aims.pull, gain))
        among = smoothed(pairs, torch.stack([pull, gain], 1), gain, recalled.group[which], self.neighbours)
        fields = {"base": batch.base, "old": self._old(batch, state) if state.old else batch.base}

        def terms_of(part: slice) -> dict[str, Tensor]:
            (i, x, t, _), values, cu, _ = among.part(part)
            a, c = values.T
            with torch.no_grad():
                fixed = {name: fields[name].select(i)(x, t) for name in {self.anchor, self.residual} & set(fields)}
            v = batch.tuned.select(i)(x, t)
            now = v.detach()
            step = cu - expand(c, x) * fixed.get(self.residual, now) + expand(a, x) * (fixed.get(self.anchor, now) - now)
            # in the network's own prediction, in which pretraining weighed errors
            scale = batch.tuned.prediction_scale(t).to(x) ** 2 / x[0].numel()
            return {"loss": scale * (v - (now + step)).flatten(1).square().sum(1)}

        return batch.accumulate(terms_of, size, over=size)


def moments(rewards: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """The mean and the standard deviation of rewards [n], weighted [n] or not."""
    if weights is None:
        return rewards.mean().item(), rewards.std(correction=0).item()
    shares, values = weights / weights.sum(), rewards.double().cpu()
    mean = float(shares @ values)
    return mean, float(shares @ (values - mean).square()) ** 0.5
