"""Minus the squared distance W2 to a reference: near it by the squares of the ways of samples."""

# Mutation tests: test_utility_transport.py

from __future__ import annotations

from typing import ClassVar, Literal

from tiltflow.evaluation.estimates import Estimate
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation import transport
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_samples
from tiltflow.utilities.estimation.known import Known, Need, spread_of_mean
from tiltflow.utilities.estimation.transport import Metric


class Wasserstein2(Utility):
    """-W2(p, reference)^2 for the distance |A (x - y)|. Its first variation is minus the dual potential, with the gradient
    -2 A^T A (x - T(x)) for the optimal map T, exactly from the optimal plan between samples; a new point goes to the reference
    sample that the plan would give it.

    The distance of samples is larger than that of their laws, by the distance between two samples of one law; the error is that
    of its mean.
    """

    words: ClassVar[str] = "a law near the reference, by the squares of how far samples move"
    needs: ClassVar[tuple[Need, ...]] = ("reference",)

    name: Literal["wasserstein-2"] = "wasserstein-2"
    metric: Metric = ()
    """A, of flat samples: a factor for each coordinate, by which moves along it cost more, or the rows of a matrix; [] for the
    Euclidean distance."""

    def _solve(self, at: Known) -> tuple[float, transport.Potential]:
        assert at.reference is not None
        return transport.solve(at.x, at.p, at.reference, self.metric, 2)

    def _value(self, at: Known) -> Estimate:
        cost, potential = self._solve(at)
        # the heights are the potential of the reference at its own samples
        return at.estimate(-cost, potential(at.x), spread_of_mean(potential.heights))

    def _first_variation(self, at: Known) -> FirstVariation:
        return of_samples(self._solve(at)[1]) * -1
