"""A two-armed bandit of continuous actions at several observations: a policy, a known value, and the exact law for each."""

# Mutation tests: test_bandit.py

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tiltflow.evaluation.distances import distances_to_law
from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.flows.field import Which
from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import GaussianMixture, QuadraticReward, mixture
from tiltflow.networks.mlp import Mlp
from tiltflow.problems import Check, Defaults, Findings, Table, Trained, to_law
from tiltflow.problems.verification.exact_base import ExactBase
from tiltflow.problems.verification.quadratic_tilt import best_of_chain, temperature
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Settings
from tiltflow.streams import new_network, stream
from tiltflow.training.batch import Drawn
from tiltflow.training.method import Method

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


PARTS = 10
"""Draws of `num_samples` actions of the tuned policy at an observation, over whose distances the mean is taken."""


class Bandit(Settings):
    """A bandit with two arms of continuous actions at several observations, under a known value.

    Behaviour prefers the worse arm: at an observation s, actions are near -arm and arm, the upper ones with probability
    1 / (1 + exp(s)), and worth Q(s, a) = slope s a - quadratic a^2 / 2.
    """

    name: Literal["bandit"] = "bandit"
    observations: Annotated[tuple[float, ...], Field(min_length=1)] = (-1.0, 0.25, 1.0)
    """Observations s, each a number."""
    arm: Positive = 0.6
    """Mean of the upper arm; that of the lower is minus it."""
    scale: Positive = 0.3
    """Standard deviation of the actions of an arm."""
    slope: float = 1.5
    """What an action is worth for each unit of the observation."""
    quadratic: Annotated[float, Field(ge=0)] = 0.5
    """What large actions cost."""
    hidden: Count = 128
    """Width of the learned correction to the exact velocity, a perceptron that sees the observation, and what the base computes
    on its way."""
    layers: Count = 3
    """Its number of layers."""
    sampling: Sampling = Sampling()
    """How the tuned policy is sampled for the distances."""

    usual_method: ClassVar[str] = "adjoint-matching"
    letters: ClassVar[Mapping[str, Sequence[str]]] = {}

    @classmethod
    def defaults(cls, method: str) -> Defaults:
        """See `tiltflow.problems.Problem`."""
        suited = ExactBase.defaults(method)
        run = {"num_samples": 2000, "draws": 100, "iterations": 300, **suited.run}
        return replace(suited, run=run)

    def behaviour(self, s: float) -> GaussianMixture:
        """The law of the actions at an observation."""
        upper = 1 / (1 + math.exp(s))
        return mixture(torch.tensor([[-self.arm], [self.arm]], dtype=torch.float64), (1 - upper, upper), self.scale)

    def value(self, s: float) -> QuadraticReward:
        """Q(s, a) as a function of a."""
        return QuadraticReward(torch.tensor([self.slope * s], dtype=torch.float64), self.quadratic)

    def base_flow(self) -> Flow:
        """The exact velocity field of the behaviour, a flow that is bound to observations [batch, 1]."""
        return Flow(Arms(self.arm, self.scale))

    def tuned_flow(self, seed: int) -> Flow:
        """The same with a learned correction, zero at the start."""
        return Flow(TunedArms(Arms(self.arm, self.scale), self.hidden, self.layers, seed))

    def reward(self) -> Value:
        """Q at the observations that it is bound to."""
        return Value(self.slope, self.quadratic)

    def draw(self, count: int, generator: torch.Generator) -> Drawn:
        """Noise [count, 1], at each observation in turn."""
        seen = torch.tensor(self.observations)[torch.arange(count) % len(self.observations), None]
        x = torch.randn(count, 1, generator=generator)
        return Drawn(x, lambda flow: flow.bind(seen), reward=replace(self.reward(), seen=seen))

    def exact_law(self, method: Method, iterations: int) -> tuple[GaussianMixture, ...]:
        """behaviour exp(Q / beta) at each observation. Raises InputError where the method aims at another law."""
        beta = temperature(method, iterations)
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
            "share of the upper arm": Check(found["upper_arm"], found["upper_arm_error"], found["upper_arm_exact"]),
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
        value, upper = mean_estimate(self.value(s)(actions)), mean_estimate((actions[:, 0] > 0).double())
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
            "upper_arm": upper.value,
            "upper_arm_error": upper.standard_error,
            "upper_arm_exact": upper_arm(law),
        }


def upper_arm(law: GaussianMixture) -> float:
    """The probability of an action above 0."""
    below = torch.special.ndtr(-law.means[:, 0] / law.variances.sqrt())
    return float((law.log_weights.exp() * (1 - below)).sum())


@dataclass(frozen=True)
class Value:
    """Q(s, a) at the observations [batch, 1] of a batch."""

    slope: float
    quadratic: float
    seen: Tensor | None = None

    def select(self, which: Which) -> Value:
        """The value at the observations of these samples."""
        return self if self.seen is None else replace(self, seen=self.seen[which])

    def __call__(self, x: Tensor) -> Tensor:
        assert self.seen is not None, "the value of actions is that at observations"
        return (self.slope * self.seen * x - self.quadratic / 2 * x.square()).sum(1)


class Arms(nn.Module):
    """The velocity (x [batch, 1], time [batch], observations [batch, 1]) -> [batch, 1] of two arms."""

    def __init__(self, arm: float, scale: float):
        super().__init__()
        self.arm, self.variance = arm, scale**2

    def forward(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        return self.velocity_and_upper(x, time, seen)[0]

    def velocity_and_upper(self, x: Tensor, time: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity, and the probability [batch, 1] that the action will be one of the upper arm."""
        t = time[:, None]
        total = t**2 * self.variance + (1 - t) ** 2
        # log densities of the arms differ by 2 t arm x / total, and log weights by -s
        upper = torch.sigmoid(2 * t * self.arm * x / total - seen)
        mean = self.arm * (2 * upper - 1)
        return mean + (t * self.variance - (1 - t)) / total * (x - t * mean), upper


class TunedArms(nn.Module):
    """The same with a learned correction, zero at the start: a number, a multiple of x and one of the velocity."""

    def __init__(self, arms: Arms, hidden: int, layers: int, seed: int):
        super().__init__()
        self.arms = arms
        self.correction = new_network(Mlp(dimension=3, outputs=3, hidden=hidden, layers=layers), seed)

    def forward(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        velocity, upper = self.arms.velocity_and_upper(x, time, seen)
        number, of_x, of_velocity = self.correction(torch.cat([x, upper, seen], 1), time).split(1, 1)
        return velocity + number + of_x * x + of_velocity * velocity  # type: ignore[no-any-return]
