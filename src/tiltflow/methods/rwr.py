r"""RWR: reward-weighted regression (arXiv 2302.12192; iterated in arXiv 2305.13301).

    loss = W |v - u|^2,      W = exp(r / beta), of mean 1 among the samples of a prompt, class or batch.

On samples of the base (one shot) its law is p_base exp(r / beta), exactly; iterated, on the model's own, it is
p_base exp(n r / beta) after n rounds, and there is no law at which that settles. It has more noise than tilt matching: what the
reward does not change is learned again from samples.
"""

# Mutation tests: test_reweighting.py

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.methods import Tempered, from_preset
from tiltflow.methods.regressions.reweighting import Reweighting
from tiltflow.samplers.grid import Start

# The baseline of the code of arXiv 2305.13301: weights softmax(5 r) over 10,240 pictures of an iteration, 5 epochs on these.
PRESETS: dict[str, dict[str, Any]] = {"ddpo-baseline": {"proposal": "tuned", "beta": 0.2, "num_passes": 5}}
OPTIMIZERS: dict[str, dict[str, Any]] = {"ddpo-baseline": {"learning_rate": 1e-5, "max_grad_norm": 1.0}}
"""The optimizer of each preset."""


class Rwr(Reweighting, Tempered):
    """Reward-weighted regression. Any reward, no gradient; on samples of the base, aims at p_base(x) exp(r(x) / beta)."""

    name: Literal["rwr"] = "rwr"
    preset: Literal["ddpo-baseline"] | None = None
    """Start from a published setting; keys given beside it win."""

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        return from_preset(PRESETS, values)

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published settings of the preset."""
        return OPTIMIZERS.get(self.preset or "", {})

    @property
    def temperature(self) -> float | None:
        """beta, of one shot; iterated, that of the law falls with every round."""
        return self.beta if self.proposal == "base" else None

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """p_base exp(n r / beta) after n rounds."""
        if self.proposal == "base":
            return exponential_tilt(self.beta)
        rounds = self.rounds(steps)
        again = (
            f"Nothing holds the model near the base: this is the law after {rounds} rounds, and each further one tilts again."
        )
        return exponential_tilt(self.beta / rounds, [again])

    def _weights(self, rewards: Tensor, members: list[Tensor]) -> Tensor:
        weights = torch.empty(len(rewards), dtype=torch.float64)
        for some in (each.cpu() for each in members):
            weights[some] = torch.softmax(rewards.double().cpu()[some] / self.beta, 0) * len(some)
        return weights
