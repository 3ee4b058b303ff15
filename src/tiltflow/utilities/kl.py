"""Minus the KL from the base: a law near the base, judged by the law alone."""

# Mutation tests: test_utilities.py

from __future__ import annotations

from typing import ClassVar, Literal

from tiltflow.evaluation.estimates import Estimate
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, Surrogate, of_samples
from tiltflow.utilities.estimation.known import Known, Need


class Kl(Utility):
    """-KL(p | p_base), in nats. Its first variation is -log p / p_base, with the gradient s_base - s of both scores; without
    the log ratio the gradient alone is known."""

    words: ClassVar[str] = "a law near the base, by the KL"
    needs: ClassVar[tuple[Need, ...]] = ("score", "base_score")
    value_needs: ClassVar[tuple[Need, ...]] = ("log_ratio",)

    name: Literal["kl"] = "kl"

    def _value(self, at: Known) -> Estimate:
        assert at.log_ratio is not None
        logs = -at.log_ratio(at.x)
        return at.estimate(at.mean(logs), logs)

    def _first_variation(self, at: Known) -> FirstVariation:
        assert at.score is not None
        assert at.base_score is not None
        if at.log_ratio is None:
            return of_samples(Surrogate(at.base_score), valued=False) + of_samples(Surrogate(at.score), valued=False) * -1
        return of_samples(Surrogate(at.base_score)) + of_samples(Surrogate(at.score, at.log_ratio)) * -1
