r"""DRaFT: the gradient of the reward, by back-propagation through the sampler (Clark et al., arXiv 2309.17400).

It ascends E r(x_K) over the last `truncation` steps of the sampler, the state before them held fixed (DRaFT-K); through all of
them, it is the gradient of the mean reward itself. Of AlignProp (arXiv 2310.03739) is the number of steps that is drawn afresh
for every batch. DRaFT-LV goes through the last step alone, and takes it again from the sample with fresh noise,

    x = t x_1 + (1 - t) eps,      x_1 held fixed,      ascend r(x + (1 - t) v(x, t)),      t the time of the last step,

whose gradients are less noisy together than one. **There is no law at which this settles:** the mean reward is all that is
asked for, and the end of training all that holds the model near the base.
"""

# Mutation tests: test_draft.py

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.laws.target import Target, maximum
from tiltflow.methods import from_preset
from tiltflow.methods.reward_gradients.ascent import Ascent
from tiltflow.samplers.grid import Start
from tiltflow.samplers.solvers.euler import euler
from tiltflow.streams import normal
from tiltflow.training.batch import Batch
from tiltflow.training.reward_ascent import ascend, follow

Count = Annotated[int, Field(ge=1)]

# Of `draft` and `draft-lv`: the paper's settings for rewards of aesthetics, on Stable Diffusion 1.4, with a LoRA of rank 8,
# batches of 4 and guidance 7.5. `alignprop`: the defaults of AlignPropTrainer in TRL, for Stable Diffusion 1.5.
DDIM: dict[str, Any] = {"solver": "ddim", "eta": 0.0, "num_inference_steps": 50}
PRESETS: dict[str, dict[str, Any]] = {
    "draft": {**DDIM, "truncation": 1},
    "draft-lv": {**DDIM, "truncation": 1, "num_renoisings": 2},
    "alignprop": {**DDIM, "eta": 1.0, "truncation": "random"},
}
ADAM: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 0,
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "draft": {**ADAM, "learning_rate": 4e-4, "adam_weight_decay": 0.1},
    "draft-lv": {**ADAM, "learning_rate": 4e-4, "adam_weight_decay": 0.1},
    "alignprop": {**ADAM, "learning_rate": 1e-3, "adam_weight_decay": 1e-4, "max_grad_norm": 1.0},
}
"""The optimizer of each preset."""


class Draft(Ascent):
    """DRaFT. Needs a differentiable reward; raises its mean, and aims at no law."""

    name: Literal["draft"] = "draft"
    preset: Literal["draft", "draft-lv", "alignprop"] | None = None
    """Start from a published setting; keys given beside it win."""

    truncation: Count | Literal["random"] | None = 1
    """The last steps of the sampler that the gradient goes through: so many; random: a number of them that is drawn for each
    batch, from 1 to all; null: all. More cost as many evaluations with a gradient, and give one of a larger variance."""
    num_renoisings: Annotated[int, Field(ge=0)] = 0
    """How often the last step is taken again from the sample with fresh noise, for a quieter gradient (DRaFT-LV). Needs
    truncation 1."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        return from_preset(PRESETS, values)

    @model_validator(mode="after")
    def _check(self) -> Draft:
        if isinstance(self.truncation, int) and self.truncation > self.num_inference_steps:
            raise ValueError(
                f"truncation {self.truncation}: the sampler has {self.num_inference_steps} steps; null is all of them"
            )
        if self.num_renoisings and self.truncation != 1:
            raise ValueError("num_renoisings takes the last step again: it needs truncation 1")
        return self

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published settings of the preset."""
        return OPTIMIZERS.get(self.preset or "", {})

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """No law: the largest mean reward."""
        held = "The gradient is that of the last steps alone, with the state before them held fixed."
        return maximum("mean reward", [] if self.truncation in (None, self.num_inference_steps) else [held])

    def gradients(self, batch: Batch, state: None) -> Iterator[dict[str, float]]:
        """One iteration of the algorithm: one optimizer step, its gradient accumulated. Samples are drawn from `batch.tuned`
        itself, not from an average of its weights, and with guidance where they are guided: the gradient is that of theirs."""
        chain, shares = self.sampling.chain(batch.start), 1 + self.num_renoisings
        first = len(chain) - self._through(len(chain), batch.generator)
        states, end = follow(batch, chain, batch.x[batch.own], first)
        measured = ascend(batch, chain.part(first, len(chain)), states, end, shares=shares)
        last = euler(chain.times[-2:])
        for _ in range(self.num_renoisings):
            states, again = follow(batch, last, noised(batch, end, last.times[0].item()))
            ascend(batch, last, states, again, shares=shares)
        yield measured

    def _through(self, steps: int, generator: torch.Generator) -> int:
        """The number of steps that the gradient of a batch goes through."""
        if self.truncation == "random":
            return int(torch.randint(1, steps + 1, (), generator=generator, device=generator.device))
        return self.truncation or steps


def noised(batch: Batch, x: Tensor, t: float) -> Tensor:
    """Samples x [own, *event] of this process at time t, with fresh noise."""
    return t * x + (1 - t) * batch.tuned.select(batch.own).project(normal(x.shape, batch.own_noise, x.dtype))
