r"""Tilt Matching (arXiv 2512.21829), and the family of forward-process regressions that it belongs to.

No gradient of the reward, no likelihood, no SDE. Round after round the inverse temperature eta of the laws p_base exp(eta r)
rises to 1 / beta. One round is

    1.  draw samples x_1 of the model, by an ODE or with noise, without gradients, and their rewards
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

With coefficient `linear` a = 1 and c = h (r - mean r), the residual that of the last round too: an explicit step of

    d v / d eta = Cov(r, u | x_t)

whose law is the tilt up to an error of order 1 / rounds. `tiltflow.methods.regressions.advantage_regression` has steps with the
whole of eta around the base, which other papers take.
"""

# Mutation tests: test_tilt_matching.py

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.errors import CollapseError
from tiltflow.flows.field import VelocityField
from tiltflow.laws.exponential_family import Pooled, effective_share, next_tilt, tilt_of
from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.methods import Tempered, from_preset
from tiltflow.methods.regressions.drawn_samples import Count, as_it_was, weights_of
from tiltflow.methods.regressions.forward_process import Learned, Regression
from tiltflow.samplers.grid import Start
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs
from tiltflow.training.replay import Recalled, Replay

OWN: dict[str, Any] = {"replay": 1, "neighbours": 1}
PRESETS: dict[str, dict[str, Any]] = {
    "implicit": {**OWN, "anchor": "old"},
    "reverse": {**OWN, "anchor": "base"},
    "reward-weighting": {**OWN, "anchor": "none"},
    "explicit": {**OWN, "anchor": "old", "coefficient": "linear"},
}
METHODS_NOW = {"ram": "ram", "awm": "awm", "adrpo": "adrpo", "nft": "diffusion-nft"}
"""Presets of earlier versions that are methods of their own."""
EXPLICIT = "Each round is one explicit step of the tilting identity: the law is the tilt up to an error of order 1 / rounds."


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


class TiltMatching(Regression, Tempered):
    """Tilt Matching. Any reward, no gradient; aims at p_base(x) exp(r(x) / beta)."""

    name: Literal["tilt-matching"] = "tilt-matching"
    preset: Literal["implicit", "reverse", "reward-weighting", "explicit"] | None = None
    """Start from a published setting; keys given beside it win. The tilt in any number of rounds: implicit (as published),
    reverse, reward-weighting. The tilt as the number of rounds grows: explicit."""

    coefficient: Literal["exponential", "linear"] = "exponential"
    """How much a sample counts: by its weight exp(h r), or by h (r - mean r), an explicit step from the last round."""
    anchor: Literal["base", "old", "none"] = "base"
    """The field that a round starts from: that of the base, of the last round, or none, which is reward weighting."""
    anchor_share: Literal["least-noise", "least-relative-noise"] = "least-noise"
    """The share of the anchor's term in the target: that which leaves the least noise, or the least relative to the weights of
    the next law, for modes that a strong tilt all but empties."""
    target_effective_sample_size: Annotated[float, Field(ge=0, lt=1)] = 0.7
    """Share of the samples of a round that their weights toward the next inverse temperature must be worth: it sets how fast
    that rises. With 0 it is 1 / beta at once."""
    proposal: Literal["tuned", "auto"] = "tuned"
    """Whose samples a round draws: the tuned model's; with auto the base's, as long as these, weighted toward 1 / beta, are
    worth `target_effective_sample_size` of their number. They have no errors of earlier rounds."""
    batches_per_round: Count = 1
    """Batches in a round. With more than one, all are drawn from the weights at its start: for models with prompts, whose batch
    is too small to fit a round on."""
    replay: Count = 8
    """Batches whose samples are kept and learned from again: the first one, of the base, and the latest. Those of other
    conditions wait until these come again. 1: each batch is used once."""
    neighbours: Count = 256
    """Samples whose mean, weighted by how likely each of them ends at x_t, stands for the one that x_t was made from: the same
    target with less noise near the start of the path (arXiv 2302.00670). 1 for none."""
    min_effective_sample_size: Annotated[float, Field(ge=1)] = 2.0
    """Stop when the weights of a batch rest on fewer samples than this."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        moved = METHODS_NOW.get(str(values.get("preset"))) if isinstance(values, dict) else None
        if moved is not None:
            raise ValueError(f"preset {values['preset']!r} is the method {moved!r} now")
        return from_preset(PRESETS, values)

    @model_validator(mode="after")
    def _check(self) -> TiltMatching:
        if self.coefficient == "linear":
            if self.replay > 1:
                raise ValueError("coefficient 'linear' has no weights for samples of earlier batches; use replay 1")
            if self.anchor != "old":
                raise ValueError(
                    "coefficient 'linear' is a step from the last round: it needs anchor 'old'; around the base: ram"
                )
            if self.proposal == "auto":
                raise ValueError("coefficient 'linear' learns from the samples of the model; use proposal 'tuned'")
        return self

    @property
    def needs(self) -> Needs:
        """Takes any reward."""
        return Needs(begins_as_base=True, passes=self.num_passes, batches_kept=self.replay)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """p_base exp(r / beta), in the limit of many rounds for explicit steps."""
        if self.coefficient == "exponential":
            return exponential_tilt(self.beta)
        return exponential_tilt(self.beta, [EXPLICIT], "first-order")

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
        if begins and (self.batches_per_round > 1 or self.anchor == "old"):
            state.old = weights_of(batch)
        size = len(batch)
        x1, rewards, batch, left_out = self._rated(batch, self._drawn_from(batch, state), first=state.batches == 0)
        constant = bool((rewards == rewards[0]).all())
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
            **left_out,
        }
        present = batch.select(recalled.where)
        for _ in range(self.num_passes):
            yield {**measured, **self._regress(present, self._learned(present, recalled, aims, state), size)}
        state.batches += 1
        if state.batches % self.batches_per_round == 0:
            state.tilt, state.old = state.aim, []

    def _drawn_from(self, batch: Batch, state: State) -> VelocityField:
        """The model as it is at the start of the round, or the base."""
        if state.from_base:
            return batch.base
        return as_it_was(batch, state.old) if self.batches_per_round > 1 else batch.actor or batch.tuned

    def _learned(self, batch: Batch, recalled: Recalled, aims: Aims, state: State) -> Learned:
        """What a step learns from, for a batch that is bound to the conditions of the samples that are recalled."""
        anchor = batch.base
        if self.anchor == "old":
            anchor = as_it_was(batch, state.old)
        pulls = [] if self.anchor == "none" else [(aims.pull, anchor)]
        return Learned(recalled.x, recalled.group, aims.gain, pulls, anchor if self.coefficient == "linear" else None)

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
                pull[members], gain[members] = 1.0, (rewards - rewards.mean()) * (state.aim - state.tilt)
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


def moments(rewards: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """The mean and the standard deviation of rewards [n], weighted [n] or not."""
    if weights is None:
        return rewards.mean().item(), rewards.std(correction=0).item()
    shares, values = weights / weights.sum(), rewards.double().cpu()
    mean = float(shares @ values)
    return mean, float(shares @ (values - mean).square()) ** 0.5
