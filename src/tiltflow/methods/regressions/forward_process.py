r"""Regression of the velocity at samples that are noised afresh: what the methods of the forward process share.

No gradient of the reward, no likelihood, no SDE: samples x_1 by an ODE, their rewards, and steps of v at
x_t = t x_1 + (1 - t) x_0, x_0 fresh noise, towards v + d, held fixed, with

    d = c (u - v_residual) + sum_j a_j (v_j - v),     u = x_1 - x_0,

c and a_j numbers of each sample, which follow from its reward, and v_j, v_residual fields: of the base, of the model as it was,
or v itself.
"""

# Mutation tests: test_tilt_matching.py test_advantage_regressions.py

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow import processes
from tiltflow.errors import InputError
from tiltflow.flows.field import VelocityField
from tiltflow.flows.interpolant import expand
from tiltflow.methods import MethodSettings, Positive
from tiltflow.rewards.functions.checked import finite_only
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling, SolverName
from tiltflow.training.batch import Batch
from tiltflow.training.noising import noising, resampled, smoothed
from tiltflow.training.scoring import Scoring, joined

Count = Annotated[int, Field(ge=1)]
Pull = tuple[Tensor, VelocityField]
"""a_j of each sample [n], float64, and v_j."""


class Rated(NamedTuple):
    """Samples with finite rewards.

    Args:
        x: [n, *event].
        rewards: [n].
        batch: bound to the conditions of these samples.
        measured: how many were left out, where some were.
    """

    x: Tensor
    rewards: Tensor
    batch: Batch
    measured: dict[str, float]


class Learned(NamedTuple):
    """Samples to learn from.

    Args:
        x: [n, *event].
        group: number of the condition of each [n].
        gain: c of each [n], float64.
        pulls: a_j and v_j.
        residual: v_residual; None for v itself.
    """

    x: Tensor
    group: Tensor
    gain: Tensor
    pulls: Sequence[Pull] = ()
    residual: VelocityField | None = None


@dataclass
class Rounds:
    """How many batches there were, and weights of the model as it was, where a method needs them."""

    device: torch.device
    batches: int = 0
    old: list[Tensor] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        return {"batches": self.batches, "old": self.old}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.batches, self.old = state["batches"], [values.to(self.device) for values in state["old"]]


class Regression(MethodSettings):
    """Part of the settings of every method that regresses the velocity at samples that are noised afresh."""

    neighbours: Count = 1
    """Samples whose mean, weighted by how likely each of them ends at x_t, stands for the one that x_t was made from: the same
    target with less noise near the start of the path (arXiv 2302.00670). 1 for none."""
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

    @model_validator(mode="after")
    def _check_solver(self) -> Self:
        if self.sampling.has_noise:
            raise ValueError(f"solver {self.solver!r} has noise, and the method needs the law of the ODE; use euler or heun")
        return self

    def learns_nothing(self, group: int) -> str | None:
        """See `MethodSettings`: a single sample has nothing to be better than."""
        if group > 1:
            return None
        return "rewards are compared among the samples of a prompt, a class or a batch, and a single one has no other"

    @property
    def sampling(self) -> Sampling:
        """The sampler that draws samples from the model while it trains."""
        return Sampling(solver=self.solver, num_inference_steps=self.num_inference_steps, shift=self.shift)

    def _rated(self, batch: Batch, flow: VelocityField, *, first: bool) -> Rated:
        """Samples of a field with their rewards. Raises InputError if all rewards of the `first` batch are equal."""
        acting = batch.whole(batch.guide(flow) if batch.guide else flow)
        with Scoring(batch) as scoring:
            x = joined(
                scoring.drawn(
                    len(batch),
                    batch.generator,
                    lambda part, noise: sample(acting.select(part), batch.x[part], self.sampling, noise, start=batch.start),
                )
            )
            rewards = scoring.rewards()
        left_out = {}
        if (kept := finite_only(rewards)) is not None:
            left_out = {"dropped": float(len(rewards) - len(kept))}
            x, rewards, batch = x[kept], rewards[kept], batch.select(kept)
        if first and len(rewards) > 1 and bool((rewards == rewards[0]).all()):
            raise InputError(
                f"the reward is {rewards[0].item():g} for all {len(rewards)} samples: there is nothing to learn from it"
            )
        return Rated(x, rewards, batch, left_out)

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> Any:
        """The state that is kept between batches."""
        return Rounds(device)

    def _regress(self, batch: Batch, some: Learned, size: int) -> dict[str, float]:
        """Accumulate the gradient of E|v - sg(v + d)|^2, with fresh noise and times.

        Args:
            batch: bound to the conditions of the samples.
            size: how many samples a step has, where no `regression_batch_size` is set.
        """
        size, coefficients = self.regression_batch_size or size, torch.stack([some.gain, *(a for a, _ in some.pulls)])
        share = coefficients.abs().sum(0)  # samples that count for nothing are not drawn, and none counts for much
        which = resampled(share.to(some.x.device), size, batch.generator)
        pairs = noising(batch.tuned, some.x, which, self.sampling, batch.generator, start=batch.start)
        drawn = which.cpu()
        values = (coefficients[:, drawn] * share.mean() / share[drawn]).to(which.device)
        among = smoothed(pairs, values.T, values[0], some.group[which], self.neighbours)
        fields = {id(one): one for one in (some.residual, *(of for _, of in some.pulls)) if one is not None}

        def terms_of(part: slice) -> dict[str, Tensor]:
            (i, x, t, _), numbers, cu, _ = among.part(part)
            c, *pulls = numbers.T
            with torch.no_grad():
                fixed = {key: one.select(i)(x, t) for key, one in fields.items()}
            v = batch.tuned.select(i)(x, t)
            now = v.detach()
            step = cu - expand(c, x) * fixed.get(id(some.residual), now)
            for a, (_, one) in zip(pulls, some.pulls, strict=True):
                step = step + expand(a, x) * (fixed[id(one)] - now)
            # in the network's own prediction, in which pretraining weighed errors
            scale = batch.tuned.prediction_scale(t).to(x) ** 2 / x[0].numel()
            return {"loss": scale * (v - (now + step)).flatten(1).square().sum(1)}

        return batch.accumulate(terms_of, size, over=size)


def weights_of(batch: Batch) -> list[Tensor]:
    """The present weights of the model that samples are drawn from: the tuned one, or its average."""
    with (batch.actor or batch.tuned).own_weights():
        return batch.copy_of_weights()


def as_it_was(batch: Batch, weights: Sequence[Tensor]) -> VelocityField:
    """The tuned model at earlier weights."""
    return batch.tuned_at([processes.part_like(w, p) for w, p in zip(weights, batch.parameters, strict=True)])


def numbered(members: Sequence[Tensor], count: int) -> Tensor:
    """The number of the condition of each sample [count], of the samples of each condition."""
    group = torch.empty(count, dtype=torch.long, device=members[0].device)
    for number, some in enumerate(members):
        group[some] = number
    return group
