"""Settings that problems of policies share: Gaussian actions, or several of them, at several observations, under a known value
that is quadratic in the action, and the exact law for each observation."""

# Mutation tests: test_bandit.py test_linear_quadratic.py

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.evaluation.distances import distances_to_law
from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.flows.field import Which
from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import GaussianMixture, QuadraticReward
from tiltflow.laws.target import TILTED
from tiltflow.problems import Check, Defaults, Exact, Findings, Table, Trained, to_law
from tiltflow.problems.verification.exact_base import ExactBase
from tiltflow.problems.verification.quadratic_tilt import best_of_chain, temperature
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Settings
from tiltflow.streams import stream
from tiltflow.training.batch import Drawn
from tiltflow.training.method import Method

Count = Annotated[int, Field(ge=1)]
PARTS = 10
"""Draws of `num_samples` actions of the tuned policy at an observation, over whose distances the mean is taken."""


class AtObservations(Settings):
    """Actions, numbers, at several observations s, worth Q(s, a) = slope s a - curvature a^2 / 2."""

    observations: Annotated[tuple[float, ...], Field(min_length=1)] = (-1.0, 0.25, 1.0)
    """Observations s, each a number."""
    hidden: Count = 128
    """Width of the learned correction to the exact velocity, a perceptron that sees the observation, and what the base computes
    on its way."""
    layers: Count = 3
    """Its number of layers."""
    sampling: Sampling = Sampling()
    """How the tuned policy is sampled for the distances."""

    numbers: ClassVar[Sequence[str]] = ()
    """Names of what `further` measures."""
    usual_method: ClassVar[str] = "adjoint-matching"
    law_in_words: ClassVar[str] = TILTED
    letters: ClassVar[Mapping[str, Sequence[str]]] = {}

    @classmethod
    def defaults(cls, method: str) -> Defaults:
        """See `tiltflow.problems.Problem`."""
        suited = ExactBase.defaults(method)
        run = {"num_samples": 2000, "draws": 100, "iterations": 300, **suited.run}
        return replace(suited, run=run)

    @abstractmethod
    def behaviour(self, s: float) -> GaussianMixture:
        """The law of the actions at an observation."""

    @abstractmethod
    def reward(self) -> Value:
        """Q at the observations that it is bound to."""

    @abstractmethod
    def base_flow(self) -> Flow:
        """The exact velocity field of the behaviour, a flow that is bound to observations [batch, 1]."""

    @abstractmethod
    def tuned_flow(self, seed: int) -> Flow:
        """The same with a learned correction, zero at the start."""

    @abstractmethod
    def further(self, law: GaussianMixture, actions: Tensor) -> dict[str, float]:
        """A number of actions [n, 1] with its error and its exact value: `x`, `x_error` and `x_exact`."""

    def value(self, s: float) -> QuadraticReward:
        """Q(s, a) as a function of a."""
        of = self.reward()
        return QuadraticReward(torch.tensor([of.slope * s], dtype=torch.float64), of.curvature)

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Noise [count, 1], at each observation in turn."""
        seen = torch.tensor(self.observations)[torch.arange(count) % len(self.observations), None]
        x = torch.randn(count, 1, generator=generator)
        return Drawn(x, lambda flow: flow.bind(seen), reward=replace(self.reward(), seen=seen))

    @property
    def groups(self) -> int:
        """See `tiltflow.problems.Comparable`: one for each observation."""
        return len(self.observations)

    def base_sampler(self) -> Exact:
        """See `tiltflow.problems.Comparable`."""
        return in_turn([self.behaviour(s).sample for s in self.observations])

    def tilted_sampler(self, beta: float) -> Exact:
        """See `tiltflow.problems.Comparable`: behaviour exp(Q / beta)."""
        return in_turn([law.sample for law in self.tilted(beta)])

    def admit(self, method: Method) -> None:
        """Any method."""

    def exact_law(self, method: Method, iterations: int) -> tuple[GaussianMixture, ...]:
        """behaviour exp(Q / beta) at each observation. Raises InputError where the method aims at another law."""
        return self.tilted(temperature(method, iterations))

    def tilted(self, beta: float) -> tuple[GaussianMixture, ...]:
        """behaviour exp(Q / beta) at each observation."""
        return tuple(self.behaviour(s).tilt(self.value(s), beta) for s in self.observations)

    def check(self, trained: Trained[tuple[GaussianMixture, ...]]) -> Findings:
        """Measure the distance to the exact law at each observation: W2, between samples of the memoryless SDE (or the solver
        asked for) and as many exact samples, the mean over `PARTS` draws; `floor` is the same between two exact samples."""
        found = [self._at(i, trained) for i in range(len(self.observations))]
        tables = [Table(f"{trained.method.name} at observation {each['observation']:g}", self._rows(each)) for each in found]
        values = {
            "per_observation": found,
            "worst_distance_over_floor": max(each["distance"] / each["floor"] for each in found),
            "loss": trained.record.metrics["loss"],
        }
        return Findings(values, [*tables, Table("of all", {"cost": trained.cost})])

    def _rows(self, found: Mapping[str, Any]) -> dict[str, Check | str]:
        """What was measured at an observation, for people."""
        best = found["distance_of_chain"]
        return {
            "W2 to the exact law": to_law(found["distance"], found["floor"]),
            "floor": Check(found["floor"], found["floor_std"]),
            "best that this chain can reach": "not known" if best is None else f"{best:.4f}",
            "behaviour": Check(found["distance_base"]),
            "mean value": Check(found["value"], found["value_error"], found["value_exact"]),
            **{
                name.replace("_", " "): Check(found[name], found[f"{name}_error"], found[f"{name}_exact"])
                for name in self.numbers
            },
        }

    def _at(self, i: int, trained: Trained[tuple[GaussianMixture, ...]]) -> dict[str, Any]:
        """What is measured at an observation; `distance_of_chain` is that of the best control of the method's chain, where that
        is known, without a floor."""
        s, law, n = self.observations[i], trained.law[i], trained.num_samples
        seen, generator = torch.full((PARTS * n, 1), s), stream(trained.seed, "evaluation", i)
        x = torch.randn(PARTS * n, 1, generator=generator)
        actions, of_base = (sample(flow.bind(seen), x, self.sampling, generator) for flow in (trained.tuned, trained.base))
        parts, exact = [*actions.split(n), of_base[:n]], stream(trained.seed, "exact", i)
        *here, base = distances_to_law(parts, law.sample, exact, directions=exact, draws=trained.draws)
        beta = temperature(trained.method, trained.iterations)
        best = best_of_chain(trained.method, self.behaviour(s), self.value(s), beta)["chain_optimum"]
        value = mean_estimate(self.value(s)(actions))
        return {
            "observation": s,
            "distance": sum(each.distance for each in here) / PARTS,
            "floor": base.floor,
            "floor_std": base.floor_std,
            "distance_of_chain": None if best is None else best["distance"],
            "distance_base": base.distance,
            "value": value.value,
            "value_error": value.standard_error,
            "value_exact": law.expectation(self.value(s)),
            **self.further(law, actions),
        }


def in_turn(samplers: Sequence[Exact]) -> Exact:
    """Exact samples of several laws, one of each in turn."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        each = -(-count // len(samplers))
        return torch.stack([sampler(each, generator) for sampler in samplers], 1).flatten(0, 1)[:count]

    return draw


@dataclass(frozen=True)
class Value:
    """Q(s, a) = slope s a - curvature a^2 / 2 at the observations [batch, 1] of a batch."""

    slope: float
    curvature: float
    seen: Tensor | None = None

    def select(self, which: Which) -> Value:
        """The value at the observations of these samples."""
        return self if self.seen is None else replace(self, seen=self.seen[which])

    def __call__(self, x: Tensor) -> Tensor:
        assert self.seen is not None, "the value of actions is that at observations"
        return (self.slope * self.seen * x - self.curvature / 2 * x.square()).sum(1)
