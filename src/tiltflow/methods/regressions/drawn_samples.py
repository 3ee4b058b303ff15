"""Methods that learn from samples of a solver and their rewards: what they draw, from whom, and what they keep."""

# Mutation tests: test_advantage_regressions.py test_reweighting.py

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow import processes
from tiltflow.errors import InputError
from tiltflow.flows.field import VelocityField
from tiltflow.methods import MethodSettings, Positive
from tiltflow.rewards.functions.checked import finite_only
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling, SolverName
from tiltflow.training.batch import Batch
from tiltflow.training.scoring import Scoring, joined

Count = Annotated[int, Field(ge=1)]


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


class DrawnSamples(MethodSettings):
    """Part of the settings of every method that learns from samples of a solver and their rewards."""

    may_have_noise: ClassVar[bool] = False
    """Whether samples of a solver with noise do as well: they have the law of the ODE up to the errors of its steps."""

    solver: SolverName = "heun"
    """The solver of `Sampling` that draws the samples."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 20
    """Steps of the solver, from noise to data."""
    shift: Positive = 1.0
    """Above 1, more steps are near the noise; see `time_grid`. The times of the regression are spread in the same way."""
    num_passes: Count = 16
    """Optimizer steps on each batch, each with fresh noise and times."""

    @model_validator(mode="after")
    def _check_solver(self) -> Self:
        if self.sampling.has_noise and not self.may_have_noise:
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


def weights_of(batch: Batch) -> list[Tensor]:
    """The present weights of the model that samples are drawn from: the tuned one, or its average."""
    with (batch.actor or batch.tuned).own_weights():
        return batch.copy_of_weights()


def as_it_was(batch: Batch, weights: Sequence[Tensor]) -> VelocityField:
    """The tuned model at earlier weights."""
    return batch.tuned_at([processes.part_like(w, p) for w, p in zip(weights, batch.parameters, strict=True)])
