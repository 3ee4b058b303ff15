"""Minus the distance W1 to a reference: near it by how far samples move, in a metric of your own."""

# Mutation tests: test_utility_transport.py

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation import critic, transport
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_samples
from tiltflow.utilities.estimation.known import Known, Need, OfSamples, spread_of_mean
from tiltflow.utilities.estimation.transport import Metric


class Wasserstein1(Utility):
    """-W1(p, reference) for the distance |A (x - y)|. Its first variation is minus the dual potential, whose gradient has the
    length 1 in that metric, |A^-T grad f| = 1: exactly, from the optimal plan between samples, or of a critic that learns it.

    The distance of samples is larger than that of their laws, by the distance between two samples of one law; the error is that
    of its mean.
    """

    words: ClassVar[str] = "a law near the reference, by how far samples move"
    needs: ClassVar[tuple[Need, ...]] = ("reference",)

    name: Literal["wasserstein-1"] = "wasserstein-1"
    metric: Metric = ()
    """A, of flat samples: a factor for each coordinate, by which moves along it cost more, or the rows of a matrix; [] for the
    Euclidean distance."""
    potential: Literal["exact", "critic"] = "exact"
    """exact: by linear programming, for up to a few thousand samples. critic: a network with a penalty of slopes above 1."""
    critic_steps: Annotated[int, Field(ge=1)] = 800
    """Steps that a critic learns."""
    critic_width: Annotated[int, Field(ge=1)] = 128
    """Units of each of the two hidden layers of a critic."""
    critic_penalty: Annotated[float, Field(gt=0)] = 10.0
    """Weight of the penalty of a critic."""
    critic_learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of a critic."""

    def _solve(self, at: Known) -> tuple[float, OfSamples, Tensor]:
        """The distance, the potential, and the reference."""
        y = at.reference
        assert y is not None
        if self.potential == "exact":
            distance, potential = transport.solve(at.x, at.p, y, self.metric, 1)
            return distance, potential, y
        f = critic.train(
            at.x,
            at.p,
            y,
            self.metric,
            steps=self.critic_steps,
            width=self.critic_width,
            penalty=self.critic_penalty,
            learning_rate=self.critic_learning_rate,
            seed=at.seed,
        )
        return float(at.mean(f(at.x)) - f(y).double().mean()), f, y

    def _value(self, at: Known) -> Estimate:
        distance, potential, y = self._solve(at)
        return at.estimate(-distance, potential(at.x), spread_of_mean(potential(y)))

    def _first_variation(self, at: Known) -> FirstVariation:
        return of_samples(self._solve(at)[1]) * -1
