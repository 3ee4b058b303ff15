r"""DiffusionNFT: the model is moved toward its good samples and away from its bad ones (negative-aware fine-tuning, arXiv
2509.16117).

With p in [0, 1] how good a sample is among those of its prompt, class or batch, 2 p - 1 = clip(A / c), and v_old the model that
draws samples, it lowers

    c [ p |b v + (1 - b) v_old - u|^2 + (1 - p) |(1 + b) v_old - b v - u|^2 ] / b  +  beta |v - v_base|^2,

on samples that are noised afresh. Up to what v does not change, the bracket over b is
b |v - v_old|^2 - 2 (2 p - 1) (v - v_old).(u - v_old), so

    d = c b (v_old - v) + c (2 p - 1) (u - v_old) + beta (v_base - v).

v_old follows the model after each batch, v_old <- m v_old + (1 - m) v, m growing from 0 to `old_decay`. Where it has caught up,
v = v_base + E[c (2 p - 1) (u - v) | x_t] / beta: for centred advantages, within the clip, the law of `ram` at temperature beta.
With the published beta and advantages that are standardised it is so far away that it is none: every round tilts the law
again.
Other than published: the loss is not divided by its own size, sample by sample.
"""

# Mutation tests: test_diffusion_nft.py

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field

from tiltflow import processes
from tiltflow.errors import InputError
from tiltflow.laws.forward_process import settled
from tiltflow.laws.law import Density, Law
from tiltflow.laws.target import RewardAt, Target, exponential_tilt
from tiltflow.methods import Positive, Tempered
from tiltflow.methods.regressions.advantage_regression import advantages
from tiltflow.methods.regressions.drawn_samples import Rounds, as_it_was
from tiltflow.methods.regressions.forward_process import Learned, Regression, numbered
from tiltflow.samplers.grid import Start
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs

UNSETTLED = (
    "Every round tilts the law again, and the penalty of the published size does not hold it: there is no law at which this"
    " settles."
)


class DiffusionNft(Regression, Tempered):
    """DiffusionNFT. Any reward, no gradient; as published it aims at no law."""

    name: Literal["diffusion-nft"] = "diffusion-nft"
    beta: Positive = 1e-4
    """Weight of |v - v_base|^2: in units of the reward's standard deviation; of reward for centred advantages, with which it is
    a temperature."""
    advantages: Literal["standardized", "centered"] = "standardized"
    """standardized: in units of the standard deviation of the group. centered: in units of reward."""
    advantage_clip: Positive = 5.0
    """c: advantages are clipped at this and at minus this."""
    interpolation: Positive = 1.0
    """b, how far the positive and the negative policy are from the model: 1, or 0.1 for several rewards at once."""
    old_decay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """m, how much of the model that draws samples stays after a batch."""
    old_decay_rate: Positive = 1e-3
    """What m grows by with each batch, from 0 on."""
    num_passes: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps on each batch, each with fresh noise and times."""

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published one."""
        return {"learning_rate": 3e-4}

    @property
    def needs(self) -> Needs:
        """Takes any reward."""
        return Needs(passes=self.num_passes)

    @property
    def temperature(self) -> float | None:
        """beta of centred advantages; those that are standardised have none."""
        return None if self.advantages == "standardized" else self.beta

    def at_temperature(self, beta: float) -> Self:
        """See `MethodSettings`. Raises InputError with standardised advantages."""
        if self.advantages == "standardized":
            raise InputError("diffusion-nft has no temperature with standardized advantages; use method.advantages centered")
        return super().at_temperature(beta)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """None as published; p_base exp(r / beta) to first order for centred advantages."""
        if self.advantages == "standardized":
            return exponential_tilt(1.0, [UNSETTLED], reaches="none")
        once = (
            "The advantage is taken once, linearly and around the base: the law is the tilt to first order in 1 / beta, and"
            " milder beyond. Where samples are worse than the mean by more than beta there is no law at which this settles."
        )
        return replace(exponential_tilt(self.beta, [once], "first-order"), exact=self._settled_law)

    def _settled_law(self, base: Law, reward: RewardAt) -> Law:
        """The law at which rounds settle, on the line. Raises ValueError where none is found."""

        def coefficient(q: Law) -> Density:
            mean, most = q.expectation(reward), self.advantage_clip
            return lambda x: np.clip(reward(x) - mean, -most, most) / self.beta

        return settled(base, coefficient, "network")

    def gradients(self, batch: Batch, state: Rounds) -> Iterator[dict[str, float]]:
        """One batch: yields once for each of `num_passes` optimizer steps, its gradient accumulated; then moves the model that
        draws samples.

        Raises InputError if all rewards of the first batch are equal.
        """
        size = len(batch)
        state.old = state.old or batch.copy_of_weights()
        old = as_it_was(batch, state.old)
        x, rewards, batch, left_out = self._rated(batch, old, first=state.batches == 0)
        old = as_it_was(batch, state.old)  # bound to the samples that are left
        members = batch.tuned.groups(len(rewards), rewards.device)
        most = self.advantage_clip
        gain = advantages(rewards, members, standardize=self.advantages == "standardized").clamp(-most, most)
        pulls = [(torch.full_like(gain, a), v) for a, v in ((most * self.interpolation, old), (self.beta, batch.base))]
        some = Learned(x, numbered(members, len(x)), gain, pulls, old)
        measured = {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std(correction=0).item(),
            **left_out,
        }
        for _ in range(self.num_passes):
            yield {**measured, **self._regress(batch, some, size)}
        stays = min(self.old_decay, self.old_decay_rate * state.batches)
        state.old = [
            torch.lerp(now, processes.part_like(then, now), stays)
            for now, then in zip(batch.copy_of_weights(), state.old, strict=True)
        ]
        state.batches += 1
