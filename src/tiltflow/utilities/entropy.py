r"""The differential entropy of the law: spread over all that there is, without a reward."""

# Mutation tests: test_utilities.py

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from scipy.spatial import cKDTree
from scipy.special import gammaln, psi

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, Surrogate, of_samples
from tiltflow.utilities.estimation.known import Known, Need


class Entropy(Utility):
    """-E log p, in nats. Its first variation -log p is known by its gradient alone, minus the score. At a price alpha of the KL
    from the base the best law is p_base^(alpha / (1 + alpha)).

    The value is the estimate of Kozachenko and Leonenko from the distances of samples to their neighbours: good in a few
    dimensions, and biased in many.
    """

    words: ClassVar[str] = "a law that is spread as widely as it can be"
    needs: ClassVar[tuple[Need, ...]] = ("score",)
    value_needs: ClassVar[tuple[Need, ...]] = ()

    name: Literal["entropy"] = "entropy"
    neighbour: Annotated[int, Field(ge=1)] = 4
    """Which nearest neighbour the value is estimated from: a later one has less noise and more bias."""

    def caveats(self, alpha: float) -> tuple[str, ...]:
        if alpha > 0:
            return ()
        return (
            "the entropy without a price of the KL from the base has no optimum: each stage spreads the law further, so the"
            " loop must stop after its stages, and what it reached depends on their number",
        )

    def _value(self, at: Known) -> Estimate:
        if at.weights is not None and not torch.allclose(at.p, at.p[0]):
            raise InputError("the entropy is estimated from samples of the law itself, without weights")
        x, k = at.x.flatten(1).double().cpu().numpy(), self.neighbour
        n, d = x.shape
        if n <= k:
            raise InputError(f"utility entropy needs more than {k} samples, got {n}")
        distances = cKDTree(x).query(x, k + 1)[0][:, k]
        if (distances == 0).any():
            raise InputError("some samples are equal: their law has no entropy")
        logs = d * torch.from_numpy(distances).log().to(at.x.device)
        ball = d / 2 * math.log(math.pi) - gammaln(d / 2 + 1)
        return at.estimate(at.mean(logs) + psi(n) - psi(k) + ball, logs)

    def _first_variation(self, at: Known) -> FirstVariation:
        score = at.score
        assert score is not None
        return of_samples(Surrogate(score), valued=False) * -1
