"""Two modes in one dimension under a bounded reward, where every law is known: the tilted law at any temperature, and the law
that reward-weighted flow matching reaches instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.distances import distance_to_law, sliced_w2
from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.laws.gaussian_mixture import GaussianMixture, mixture
from tiltflow.laws.law import Array, Law, log_normal, velocity_distance
from tiltflow.problems import Check, Defaults, Findings, Table, Trained, to_law
from tiltflow.problems.verification.exact_base import ExactBase, tilt_reached, tilt_rows
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.method import Method

Positive = Annotated[float, Field(gt=0)]
QUANTITIES = {
    "mean": "mean",
    "variance": "variance",
    "reward": "mean reward",
    "positive": "P(x > 0)",
    "w2_to_base": "W2 to the base",
    "kl_to_base": "KL to the base",
    "penalty": "E|v - v_base|²",
}
"""Numbers that describe a law, and their names in the table of laws."""


class TwoModes(ExactBase):
    """Two equal modes in one dimension under the bounded reward tanh(x): every method's law is known."""

    name: Literal["two-modes"] = "two-modes"
    separation: Positive = 1.5
    """The modes are at -separation and separation."""
    scale: Positive = 0.5
    """Standard deviation of each."""
    sampling: Sampling = Sampling(solver="heun")

    @classmethod
    def defaults(cls, method: str) -> Defaults:
        """See `tiltflow.problems.Problem`; ORW-CFM-W2 learns in rounds, each from many samples."""
        suited = super().defaults(method)
        if method != "orw-cfm-w2":
            return suited
        run = {"iterations": 1500, "train_batch_size": 8192, "ema_decay": 0.97}
        return replace(suited, method={"num_passes": 30}, run=run)

    def base(self) -> GaussianMixture:
        """The two modes."""
        return mixture(torch.tensor([[-self.separation], [self.separation]], dtype=torch.float64), (1.0, 1.0), self.scale)

    def law(self) -> Law:
        """The base on a grid."""
        m, s = self.separation, self.scale
        return Law.of(lambda x: np.logaddexp(log_normal(x, -m, s), log_normal(x, m, s)))

    def reward(self) -> Callable[[Tensor], Tensor]:
        """tanh x, of samples [batch, 1] -> [batch]."""
        return lambda x: torch.tanh(x[:, 0])

    def tilted_sampler(self, beta: float) -> Callable[[int, torch.Generator], Tensor]:
        """See `ExactBase`."""
        law = self.law()
        return sampler(law.tilt(self.reward_at(law.points) / beta))

    @staticmethod
    def reward_at(x: Array) -> Array:
        """The same reward of points x [n]."""
        return np.tanh(x)

    def tilted(self, method: Method, iterations: int) -> Law:
        """The exponential tilt that the method aims at, or that its own law is to first order."""
        return method.target(iterations).tilted(self.law(), self.reward_at)

    def exact_law(self, method: Method, iterations: int) -> Law:
        """The method's own law. Raises InputError if it is not known or does not exist."""
        try:
            return method.target(iterations).law(self.law(), self.reward_at)
        except ValueError as error:
            raise InputError(f"verify two-modes: {error}") from None

    def check(self, trained: Trained[Law]) -> Findings:
        """Measure the distance to the method's own target and to the tilted law.

        Distances are 2-Wasserstein, in units of x; `floor` is that between two exact samples.
        """
        law, own, reward = self.law(), trained.law, self.reward()
        tilted = self.tilted(trained.method, trained.iterations)
        generator, target = stream(trained.seed, "evaluation"), trained.method.target(trained.record.step)
        noise = torch.randn(trained.num_samples, 1, generator=generator)
        x = sample(trained.tuned, noise, self.sampling, generator)
        x_base = sample(trained.base, noise, self.sampling, generator)
        directions = stream(trained.seed, "directions")
        to_own = distance_to_law(x, sampler(own), generator, directions=directions, draws=trained.draws)
        mean = mean_estimate(reward(x))
        laws = {"base": law, "own": own, "tilted": tilted}
        values: dict[str, Any] = {
            "target_law": target.words,
            "laws": {name: describe(q, law, self.reward_at) for name, q in laws.items()},
            "reached": {
                "mean": x.mean().item(),
                "variance": x.var().item(),
                "reward": mean.value,
                "positive": (x > 0).double().mean().item(),
                "w2_to_base": distance_to_law(x, sampler(law), generator, directions=directions, draws=trained.draws).distance,
            },
            "reward_error": mean.standard_error,
            "distance": to_own.distance,
            "floor": to_own.floor,
            "floor_std": to_own.floor_std,
            "distance_tilted": distance_to_law(
                x, sampler(tilted), generator, directions=directions, draws=trained.draws
            ).distance,
            "distance_base": sliced_w2(x_base, sampler(own)(len(x_base), generator), torch.ones(1, 1)),
            "own_to_tilted": own.w2(tilted),
            **tilt_reached(trained, x, x_base, self.sampling, reward, target.log_tilt),
        }
        return Findings(values, [self._laws(trained, values), distances(trained, values)])

    def _laws(self, trained: Trained[Law], values: dict[str, Any]) -> Table:
        """The exact laws side by side with what training reached."""
        exact = [values["laws"][name] for name in ("base", "tilted", "own")]
        rows = {}
        for key, label in QUANTITIES.items():
            numbers = [f"{abs(law[key]) if abs(law[key]) < 1e-9 else law[key]:.4f}" for law in exact]
            rows[label] = [*numbers, f"{values['reached'][key]:.4f}" if key in values["reached"] else ""]
        title = f"{trained.method.name} on {self.name}"
        return Table(title, rows, ("base", "tilted law", "own target", "reached"))


def distances(trained: Trained[Law], values: dict[str, Any]) -> Table:
    """The distances to the exact laws."""
    rows: dict[str, Check | str] = {
        "to its own target": to_law(values["distance"], values["floor"]),
        "floor": Check(values["floor"], values["floor_std"]),
        "to the tilted law": Check(values["distance_tilted"], note=f"own target to tilted law: {values['own_to_tilted']:.4f}"),
        "untuned base": Check(values["distance_base"]),
        **tilt_rows(values),
        "own target": values["target_law"],
        "cost": f"{trained.record.seconds:.0f} s, {trained.record.network_evaluations} network evaluations",
    }
    return Table("W2", rows)


def sampler(law: Law) -> Callable[[int, torch.Generator], Tensor]:
    """Exact samples [count, 1] of a law, by its quantiles."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        levels = torch.rand(count, generator=generator, dtype=torch.float64)
        return torch.from_numpy(law.quantiles(levels.numpy()))[:, None]

    return draw


def describe(law: Law, base: Law, reward: Callable[[Array], Array]) -> dict[str, float]:
    """The `QUANTITIES` of a law; `penalty` is the integral of E|v - v_base|^2 for its own velocity."""
    same = law is base or np.array_equal(law.log_density, base.log_density)
    return {
        "mean": law.mean,
        "variance": law.variance,
        "reward": law.expectation(reward),
        "positive": law.positive,
        "w2_to_base": 0.0 if same else law.w2(base),
        "kl_to_base": 0.0 if same else law.kl(base),
        "penalty": 0.0 if same else velocity_distance(law, base),
    }
