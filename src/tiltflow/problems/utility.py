r"""A utility of the whole law, at a price of the KL from a Gaussian or a mixture, on the line or in the plane.

The law that is best, argmax_p F(p) - alpha KL(p | p_base), is computed by quadrature from other code than the utilities
(`laws/functionals.py`, `laws/utility_optimum.py`), and reached by stages (`runs/staged/verification.py`). Where a utility alone
has only its reference as the optimum, as distances have, a reward is added to it.
"""

# Mutation tests: test_verify_utility.py

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tiltflow.errors import InputError
from tiltflow.evaluation.distances import distance_to_law, random_directions, sliced_w2
from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.evaluation.log_ratio import ODE_STEPS, log_density
from tiltflow.flows.field import VelocityField
from tiltflow.flows.flow import Flow
from tiltflow.laws.functionals import Grid
from tiltflow.laws.gaussian_mixture import (
    CorrectedVelocity,
    ExactVelocity,
    GaussianMixture,
    QuadraticReward,
    Vector,
    mixture,
    vector,
)
from tiltflow.laws.utility_optimum import tilted
from tiltflow.networks.mlp import Mlp
from tiltflow.problems import Check, Defaults, Findings, Table, Trained, Tree, to_law
from tiltflow.problems.verification.best_law import Best, Points, best_law
from tiltflow.problems.verification.exact_base import ExactBase
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import new_network, stream
from tiltflow.training.method import Method
from tiltflow.utilities import NamedUtility
from tiltflow.utilities import Utility as OfLaw
from tiltflow.utilities.cvar import Cvar
from tiltflow.utilities.entropy import Entropy
from tiltflow.utilities.estimation.known import Known
from tiltflow.utilities.expected_reward import ExpectedReward
from tiltflow.utilities.log_barrier import LogBarrier
from tiltflow.utilities.spread_conditions import SpreadConditions
from tiltflow.utilities.sum import Sum, Term
from tiltflow.utilities.superquantile import Superquantile

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NODES = {1: 3601, 2: 161}
"""Of the quadrature, along each dimension."""
REACH = 9.0
"""Of the grid beyond the means of the base, in its largest standard deviations."""
OWN = "tiltflow.problems.verification.own_utility:mean_less_half_the_variance"


@dataclass(frozen=True)
class Suited:
    """Settings that suit a utility where nothing else is asked for: of the utility itself, and of the problem."""

    utility: Tree = field(default_factory=dict)
    problem: Tree = field(default_factory=dict)


def staged(stages: int, mixing: float, **problem: Any) -> dict[str, Any]:
    return {"stages": stages, "mixing": mixing, **problem}


REWARDED = {"kl", "renyi", "wasserstein-1", "wasserstein-2", "mmd"}
"""Utilities whose optimum alone is the base: an expected reward is added."""
SUITED: dict[str, Suited] = {
    "expected-reward": Suited({}, staged(1, 1.0)),
    "cvar": Suited({"share": 0.3}, staged(6, 1.0, alpha=3.0)),
    "superquantile": Suited({"share": 0.2}, staged(5, 0.6, alpha=4.0)),
    "mean-variance": Suited({"aversion": 0.5}, staged(6, 1.0, alpha=2.0)),
    "entropic-risk": Suited({"risk": -1.0}, staged(6, 1.0, alpha=2.0)),
    "log-barrier": Suited({"limit": 0.8, "strength": 0.2}, staged(4, 0.4)),
    "augmented-lagrangian": Suited({"limit": 0.5, "price": 1.0}, staged(8, 0.5)),
    "entropy": Suited({}, staged(3, 0.65, alpha=2.0)),
    "kl": Suited({}, staged(3, 0.5)),
    "renyi": Suited({"order": 0.5}, staged(4, 0.6)),
    "wasserstein-1": Suited({}, staged(3, 1.0, linear=2.0, law_samples=1000)),
    "wasserstein-2": Suited({}, staged(5, 0.4, linear=2.0, alpha=2.0, law_samples=1000)),
    "mmd": Suited({"bandwidth": 1.0}, staged(4, 0.7, law_samples=2000)),
    "optimal-design": Suited({}, staged(3, 0.7, alpha=4.0)),
    "spread-conditions": Suited({}, staged(1, 1.0, means=((-0.5,), (0.5,)))),
    "sum": Suited({"utilities": ({"utility": "expected-reward"}, {"utility": "entropy", "weight": 0.5})}, staged(3, 2 / 3)),
    "function": Suited({"path": OWN}, staged(6, 1.0, alpha=2.0)),
}

RUN: Tree = {"iterations": 200, "train_batch_size": 512, "num_samples": 4000, "ema_decay": 0.95}
RUNS: dict[str, Tree] = {"tilt-matching": {"iterations": 400, "train_batch_size": 4096}}
ROUNDS: dict[str, Tree] = {
    "endpoint-adjoint-matching": {"num_passes": 10},
    "tilt-matching": {"num_passes": 50, "regression_batch_size": 512, "num_inference_steps": 15},
}


class Utility(ExactBase):
    """Stages for a utility of the whole law, whose best law at a price of the KL is known by quadrature."""

    name: Literal["utility"] = "utility"
    utility: NamedUtility
    """Any of the utilities, by its name, or with its settings."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Price of the KL from the base, in units of the utility."""
    stages: Count = 4
    """Number of stages; `iterations` is that of the optimizer steps of each."""
    mixing: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the newest first variation in what a stage is tuned for; from the last model a stage is at the temperature
    alpha / mixing."""
    stage_base: Literal["first", "last"] = "first"
    """What each stage starts from and keeps near: the first model, or the last one."""
    reward_weight: float | None = None
    """Weight of an expected reward that is added to the utility; by default 1 for distances from the base, 0 for others."""
    dimension: Annotated[int, Field(ge=1, le=2)] = 1
    """Dimension of x: the line, or the plane."""
    means: Annotated[tuple[tuple[float, ...], ...], Field(min_length=1)] = ((0.0,),)
    """Means of the modes of the base, one list each; missing numbers are 0. For spread-conditions each mode is a class."""
    weights: tuple[Positive, ...] | None = None
    """Weights of the modes, of any sum; equal by default."""
    scale: Positive | tuple[Positive, ...] = 1.0
    """Standard deviation of the modes: one for all, or one for each."""
    linear: Vector = 1.0
    """c of the reward c.x - q |x|^2 / 2: one number for all coordinates, or a list whose missing numbers are 0."""
    quadratic: float = 0.0
    """q of the reward."""
    cost_linear: Vector = 1.0
    """c of the cost c.x + q |x|^2 / 2, where the utility has one."""
    cost_quadratic: Annotated[float, Field(ge=0)] = 0.0
    """q of the cost."""
    law_samples: Annotated[int, Field(ge=2)] = 4000
    """Samples of each model that the utility is estimated from."""
    eps: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Scores are those at the time 1 - eps: of samples with noise of the standard deviation eps / (1 - eps). Errors of the
    field count 1 / eps times in them."""
    hidden: Count = 64
    sampling: Sampling = Sampling(solver="heun", num_inference_steps=20)

    usual_method: ClassVar[str] = "endpoint-adjoint-matching"

    @model_validator(mode="before")
    @classmethod
    def _suit_the_utility(cls, values: Any) -> Any:
        """Settings that are not given are those that suit the utility."""
        if not isinstance(values, dict):
            return values
        given = values.get("utility", {})
        if isinstance(given, str):
            given = {"name": given}
        name = given.get("name", "superquantile") if isinstance(given, dict) else getattr(given, "name", "")
        suited = SUITED.get(str(name), Suited())
        if isinstance(given, dict):
            given = {**suited.utility, "name": name, **given}
        return {**suited.problem, **values, "utility": given}

    @model_validator(mode="after")
    def _check_sizes(self) -> Utility:
        if max(map(len, self.means)) > self.dimension:
            raise ValueError(f"a mean has more numbers than dimension {self.dimension}")
        for name, value in (("weights", self.weights), ("scale", self.scale)):
            if isinstance(value, tuple) and len(value) != len(self.means):
                raise ValueError(f"{name} has {len(value)} numbers for {len(self.means)} modes")
        for name, value in (("linear", self.linear), ("cost_linear", self.cost_linear)):
            if isinstance(value, tuple) and len(value) > self.dimension:
                raise ValueError(f"{name} has {len(value)} numbers, dimension is {self.dimension}")
        if self.labelled and (len(self.means) < 2 or self.weights is not None):
            raise ValueError("spread-conditions needs two modes or more, each of which is a class, and no weights")
        return self

    @classmethod
    def defaults(cls, method: str) -> Defaults:
        """See `tiltflow.problems.Problem`: a stage is small."""
        suited = super().defaults(method)
        rounds, run = ROUNDS.get(method, suited.method), {**RUN, **RUNS.get(method, {})}
        return replace(suited, method=rounds, run=run, optimizer={**suited.optimizer, "learning_rate": 1e-2})

    # ---- what is asked for ----

    @property
    def labelled(self) -> bool:
        """Whether each mode of the base is a class of its own."""
        return isinstance(self.utility, SpreadConditions)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of the model, if it has some."""
        return tuple(f"mode {k + 1}" for k in range(len(self.means))) if self.labelled else ()

    @property
    def from_first(self) -> bool:
        """Whether each stage starts from the first model: not without a price, which is the temperature there."""
        return self.stage_base == "first" and self.alpha > 0

    @property
    def posed(self) -> OfLaw:
        """The utility that is maximised, with the reward that is added to it."""
        weight = self.reward_weight
        if weight is None:
            weight = 1.0 if self.utility.name in REWARDED else 0.0
        if weight == 0:
            return self.utility
        return Sum(utilities=(Term(utility=ExpectedReward(), weight=weight), Term(utility=self.utility)))

    def base(self) -> GaussianMixture:
        """The mixture."""
        means = torch.stack([vector(mean, self.dimension) for mean in self.means])
        return mixture(means, self.weights or (1.0,) * len(means), self.scale)

    def bases(self) -> tuple[GaussianMixture, ...]:
        """The base of each class; the whole where there are none."""
        whole = self.base()
        if not self.labelled:
            return (whole,)
        return tuple(
            GaussianMixture(torch.zeros(1, dtype=torch.float64), mean[None], variance[None])
            for mean, variance in zip(whole.means, whole.variances, strict=True)
        )

    def base_flow(self) -> Flow:
        """The exact velocity field, of each class."""
        return Flow(self._networks([ExactVelocity(law) for law in self.bases()]))

    def tuned_flow(self, seed: int) -> Flow:
        """The same, each plus a perceptron, zero at the start."""
        settings = Mlp(dimension=self.dimension, hidden=self.hidden, layers=self.layers)
        parts = [
            CorrectedVelocity(ExactVelocity(law), NoneAtData(new_network(settings, seed + z)))
            for z, law in enumerate(self.bases())
        ]
        return Flow(self._networks(parts))

    def _networks(self, parts: list[Any]) -> nn.Module:
        return OfClasses(parts) if self.labelled else parts[0]

    def reward(self) -> QuadraticReward:
        """c.x - q |x|^2 / 2."""
        return QuadraticReward(vector(self.linear, self.dimension), self.quadratic)

    def rewards(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The rewards that the utility is made of."""
        cost = QuadraticReward(vector(self.cost_linear, self.dimension), -self.cost_quadratic)
        every: dict[str, Callable[[Tensor], Tensor]] = {"reward": self.reward(), "cost": cost}
        return {name: every[name] for name in self.posed.reward_names}

    def log_odds(self, x: Tensor) -> Tensor:
        """log p(x | class) of the base: the classifier that judges spread-conditions, which stays as it is."""
        whole = self.base()
        squares = (x[:, None] - whole.means.to(x)).square().sum(2)
        variances = whole.variances.to(x)
        return -squares / (2 * variances) - self.dimension / 2 * variances.log()

    # ---- the exact optimum ----

    @cached_property
    def grid(self) -> Grid:
        """Of all quadratures."""
        whole, reach = self.base(), REACH * float(self.base().variances.max()) ** 0.5
        means = whole.means.numpy()
        return Grid(
            tuple(
                np.linspace(means[:, i].min() - reach, means[:, i].max() + reach, NODES[self.dimension])
                for i in range(self.dimension)
            )
        )

    def points(self) -> Points:
        """The base and the rewards at the points of the grid."""
        x = self.grid.points
        masses = []
        for law in self.bases():
            squares, variances = ((x[:, None] - law.means.numpy()) ** 2).sum(2), law.variances.numpy()
            logs = law.log_weights.numpy() - squares / (2 * variances) - self.dimension / 2 * np.log(variances)
            masses.append(tilted(np.ones(len(x)), np.logaddexp.reduce(logs, 1)))
        linear, cost = (vector(each, self.dimension).numpy() for each in (self.linear, self.cost_linear))
        squares = (x**2).sum(1) / 2
        rewards = {"reward": x @ linear - self.quadratic * squares, "cost": x @ cost + self.cost_quadratic * squares}
        log_odds = self.log_odds(torch.from_numpy(x)).numpy() if self.labelled else None
        return Points(self.grid, tuple(masses), rewards, log_odds)

    def exact_law(self, method: Method, iterations: int) -> Best | None:
        """The law that is best; None for an entropy without a price, which has none. Raises InputError where it is not
        known."""
        points = self.points()
        self._check(self.posed, points)
        if self.alpha == 0 and isinstance(self.posed, Entropy):
            return None
        if self.alpha == 0:
            raise InputError("verify utility: alpha must be above 0: without a price of the KL the best law has no density")
        return best_law(self.posed, self.alpha, points)

    def _check(self, utility: OfLaw, at: Points) -> None:
        """Raise InputError for a tail without a sample, and for a barrier that the base is beyond."""
        for term in utility.utilities if isinstance(utility, Sum) else ():
            self._check(term.utility, at)
        if isinstance(utility, Cvar | Superquantile) and utility.share * self.law_samples < 1:
            raise InputError(
                f"verify utility: the tail with share {utility.share:g} of {self.law_samples} samples has less than one of"
                " them: take more samples (law_samples), or a larger share"
            )
        if isinstance(utility, LogBarrier) and (cost := float(at.base[0] @ at.rewards["cost"])) >= utility.limit:
            raise InputError(
                f"verify utility: the mean cost of the base is {cost:.4g}, beyond the limit {utility.limit:g} of the"
                " log-barrier, and stages begin there: raise utility.limit"
            )

    # ---- what was reached ----

    def check(self, trained: Trained[Best | None]) -> Findings:
        """Measure the distance to the best law, and the utility and the KL beside the exact ones.

        Distances are 2-Wasserstein on the line and sliced in the plane, in units of x; of classes the root mean square.
        """
        best, generator = trained.law, stream(trained.seed, "evaluation")
        classes = max(1, len(self.class_names))
        labels = torch.arange(trained.num_samples) % classes
        tuned, base = (bound(flow, labels if self.labelled else None) for flow in (trained.tuned, trained.base))
        noise = self.draw(trained.num_samples, generator)
        x, x_base = (sample(field, noise, self.sampling, generator) for field in (tuned, base))
        some = min(self.law_samples, trained.num_samples)
        few, few_labels = x[:some], labels[:some]
        fields = [bound(flow, few_labels if self.labelled else None) for flow in (trained.tuned, trained.base)]
        logs = log_density(fields[0], few, ODE_STEPS) - log_density(fields[1], few, ODE_STEPS)
        utility = self.posed if best is None else best.utility
        at = Known(
            few,
            reward=self.rewards(),
            log_ratio=lambda _: logs,
            log_odds=self.log_odds if self.labelled else None,
            labels=few_labels if self.labelled else None,
            reference=sample(base, self.draw(trained.num_samples, generator), self.sampling, generator)[:some],
            seed=trained.seed,
        )
        try:
            found = utility.value(at)
            value, error, beyond = found.value, found.standard_error, None
        except InputError as problem:  # a barrier that the last stage has crossed
            value, error, beyond = None, None, str(problem)
        divergence = mean_estimate(logs)
        values: dict[str, Any] = {
            "utility": utility.model_dump(mode="json"),
            "alpha": self.alpha,
            "stages": self.stages,
            "stage_base": "first" if self.from_first else "last",
            "utility_value": value,
            "utility_error": error,
            "utility_exact": None if best is None else best.value,
            "kl": divergence.value,
            "kl_error": divergence.standard_error,
            "kl_exact": None if best is None else best.kl,
            "caveats": [*utility.caveats(self.alpha), *([] if beyond is None else [beyond])],
        }
        if best is None:
            values |= dict.fromkeys(("distance", "floor", "floor_std", "distance_base", "ratio"))
        else:
            of_each = partial(of_classes, classes=classes, generator=stream(trained.seed, "slices"))
            to_best, of_base = (
                distance_to_law(
                    each,
                    best.sample,
                    stream(trained.seed, "exact"),
                    directions=stream(trained.seed, "directions"),
                    distance=of_each if self.labelled else None,
                    draws=trained.draws,
                )
                for each in (x, x_base)
            )
            values |= {
                "distance": to_best.distance,
                "floor": to_best.floor,
                "floor_std": to_best.floor_std,
                "distance_base": of_base.distance,
                "ratio": to_best.distance / to_best.floor,
            }
        return Findings(values, [self._reached(trained, values, utility)])

    def _reached(self, trained: Trained[Best | None], values: Mapping[str, Any], utility: OfLaw) -> Table:
        """The distance to the best law, and what else can be compared with it."""
        kind = "W2" if self.dimension == 1 else "sliced W2"
        rows: dict[str, Check | str] = {}
        if values["distance"] is not None:
            rows |= {
                f"{kind} to the best law": to_law(values["distance"], values["floor"]),
                "floor": Check(values["floor"], values["floor_std"]),
                "untuned base": Check(values["distance_base"]),
            }
        if values["utility_value"] is not None:
            rows["utility"] = Check(values["utility_value"], values["utility_error"], values["utility_exact"])
        rows |= {
            "KL from the base": Check(values["kl"], values["kl_error"], values["kl_exact"]),
            "maximised": f"{utility.words}, less {self.alpha:g} × KL",
            "stages": f"{self.stages}, each from the {values['stage_base']} model",
        }
        if self.reward_weight is None and self.utility.name in REWARDED:
            rows["a reward is added"] = f"the best law of {self.utility.name} alone is the base"
        rows |= {f"caveat {i}" if i > 1 else "caveat": text for i, text in enumerate(values["caveats"], 1)}
        return Table(f"{trained.method.name} on {self.name} {self.utility.name}", {**rows, "cost": trained.cost})


def bound(flow: Flow, labels: Tensor | None) -> VelocityField:
    """The field of samples of these classes."""
    return flow if labels is None else flow.bind(labels)


def of_classes(x: Tensor, y: Tensor, *, classes: int, generator: torch.Generator) -> float:
    """Sliced W2 of samples whose classes come in turn: the root mean square over the classes."""
    directions = random_directions(x.shape[1], generator)
    return math.sqrt(sum(sliced_w2(x[z::classes], y[z::classes], directions) ** 2 for z in range(classes)) / classes)


class NoneAtData(nn.Module):
    """A correction that vanishes at the data, where the field of every law is x: a score that is read just before, (t v - x) /
    (1 - t), then has the error of the perceptron and not that over 1 - t."""

    def __init__(self, correction: nn.Module):
        super().__init__()
        self.correction = correction

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return (1 - time[:, None]) * self.correction(x, time)  # type: ignore[no-any-return]


class OfClasses(nn.Module):
    """A velocity for each class: (x [batch, dimension], time [batch], labels [batch]) -> [batch, dimension]."""

    def __init__(self, parts: list[nn.Module]):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        every = torch.stack([part(x, time) for part in self.parts])
        return every[labels, torch.arange(len(x), device=x.device)]
