"""Minus the Renyi divergence of any order from the base: a law near it, above all where the base has little (order > 1)."""

# Mutation tests: test_utilities.py

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate
from tiltflow.flows.field import Which
from tiltflow.rewards import Metadata
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, Surrogate, of_samples
from tiltflow.utilities.estimation.known import Known, Need


class Renyi(Utility):
    """-D_b(p | p_base), D_b = log int p^b p_base^(1 - b) dx / (b - 1) of the order b, in nats. With the ratio L = log p /
    p_base and Z = E_p exp((b - 1) L) its first variation is -b exp((b - 1) L) / ((b - 1) Z)."""

    needs: ClassVar[tuple[Need, ...]] = ("score", "base_score", "log_ratio")
    value_needs: ClassVar[tuple[Need, ...]] = ("log_ratio",)

    name: Literal["renyi"] = "renyi"
    order: Annotated[float, Field(gt=0)] = 2.0
    """Order b of the divergence, above 0; in the limit of 1 it is the KL."""

    @field_validator("order")
    @classmethod
    def _not_one(cls, order: float) -> float:
        if order == 1:
            raise ValueError("must not be 1: that is the utility kl")
        return order

    @property
    def words(self) -> str:
        return f"a law near the base, by the Renyi divergence of order {self.order:g}"

    @property
    def concave(self) -> bool:
        return self.order < 1

    def _powers(self, at: Known) -> tuple[Tensor, float]:
        """(b - 1) L at the samples [n], and log Z."""
        assert at.log_ratio is not None
        powers = (self.order - 1) * at.log_ratio(at.x).detach().double()
        return powers, float(torch.logsumexp(powers + at.p.log(), 0))

    def _value(self, at: Known) -> Estimate:
        powers, log_z = self._powers(at)
        return at.estimate(-log_z / (self.order - 1), (powers - log_z).exp() / (self.order - 1))

    def _first_variation(self, at: Known) -> FirstVariation:
        assert at.score is not None
        assert at.base_score is not None
        ratio = of_samples(Surrogate(at.score, at.log_ratio)) + of_samples(Surrogate(at.base_score)) * -1
        _, log_z = self._powers(at)
        b = self.order
        return of_samples(Exponential(ratio, b - 1, -log_z)) * (-b / (b - 1))


@dataclass(frozen=True)
class Exponential:
    """exp(factor of(x) + shift)."""

    of: FirstVariation
    factor: float
    shift: float

    def __call__(self, x: Tensor) -> Tensor:
        return (self.factor * self.of(x) + self.shift).exp()

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> Exponential:
        return replace(self, of=self.of.given(prompts, metadata))

    def select(self, which: Which) -> Exponential:
        return replace(self, of=self.of.select(which))
