r"""ReFL: the gradient of the reward at the sample that a late step predicts (Xu et al., arXiv 2304.05977).

Each batch is drawn to one late step k of the sampler, at random, without gradients, and ascends there

    E r(x_k + (1 - t_k) v(x_k, t_k)),      x_k held fixed,

the reward of what the model takes to be the sample: its mean, given x_k, if the field is exact. It is the gradient of no one
number, as the law of x_k changes with the model and is not differentiated, and a reward of means, which are smoother than
samples. **There is no law at which this settles:** the end of training, and `reward_cap`, are all that holds the model near the
base.
"""

# Mutation tests: test_refl.py

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from tiltflow.laws.target import Target, maximum
from tiltflow.methods import from_preset
from tiltflow.methods.reward_gradients.ascent import Ascent
from tiltflow.samplers.grid import Start
from tiltflow.samplers.solvers.euler import euler
from tiltflow.training.batch import Batch
from tiltflow.training.reward_ascent import ascend, follow

Fraction = Annotated[float, Field(ge=0, le=1)]

# `official-code`: ImageReward's ReFL.py, of Stable Diffusion 1.4 without guidance, batches of 2 on each of several devices and
# 4 of them a step: the sampler of 40 steps, one of the last ten; no gradient for a reward of 2 and above.
PRESETS: dict[str, dict[str, Any]] = {
    "official-code": {
        "solver": "ddpm",
        "num_inference_steps": 40,
        "earliest": 0.75,
        "latest": 1.0,
        "reward_cap": 2.0,
    },
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "official-code": {
        "learning_rate": 1e-5,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 1e-2,
        "max_grad_norm": 1.0,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
    },
}
"""The optimizer of each preset."""


class Refl(Ascent):
    """ReFL. Needs a differentiable reward; raises its mean at predicted samples, and aims at no law."""

    name: Literal["refl"] = "refl"
    preset: Literal["official-code"] | None = None
    """Start from a published setting; keys given beside it win."""

    earliest: Fraction = 0.75
    """The first step that a batch may be drawn to, as a part of the sampler's steps: 0 is noise."""
    latest: Fraction = 1.0
    """The end of the steps that a batch may be drawn to: 1 is the last one."""
    reward_cap: float | None = None
    """Samples have no gradient from this reward on, in units of reward."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        return from_preset(PRESETS, values)

    @model_validator(mode="after")
    def _check(self) -> Refl:
        first, end = self._window
        if first >= end:
            raise ValueError(
                f"earliest {self.earliest:g} and latest {self.latest:g}: no step of {self.num_inference_steps} is between them"
            )
        return self

    @property
    def _window(self) -> tuple[int, int]:
        """The steps [first, end) that a batch may be drawn to."""
        first, end = (round(part * self.num_inference_steps) for part in (self.earliest, self.latest))
        return first, end

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published settings of the preset."""
        return OPTIMIZERS.get(self.preset or "", {})

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """No law: the largest mean reward of the samples that late steps predict."""
        means = "The reward is that of predicted samples, the means given a noisy state, which are smoother than samples."
        return maximum("mean reward of the samples that late steps predict", [means])

    def gradients(self, batch: Batch, state: None) -> Iterator[dict[str, float]]:
        """One iteration of the algorithm: one optimizer step, its gradient accumulated. States are drawn from `batch.tuned`
        itself, not from an average of its weights, and with guidance where samples are guided."""
        chain, generator = self.sampling.chain(batch.start), batch.generator
        k = int(torch.randint(*self._window, (), generator=generator, device=generator.device))
        _, x = follow(batch, chain.part(0, k), batch.x[batch.own], k)
        rest = euler(torch.stack([chain.times[k], chain.times[-1]]))
        states, predicted = follow(batch, rest, x)
        yield ascend(batch, rest, states, predicted, cap=self.reward_cap)
