"""What advice depends on: facts of a recipe's model and reward, from its settings and a few samples of the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.laws.target import exponential_tilt
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.methods.tilt_matching import TiltMatching
from tiltflow.runs.caveats import few_steps_limits
from tiltflow.runs.doctor import admit
from tiltflow.runs.doctor.target import divergence, effective_samples, temperature_of, too_few_to_know
from tiltflow.runs.recipe import Recipe
from tiltflow.training.optimizer import Optimizer

REACHABLE = 0.05
"""Share of base samples that carry the weight of a law which an evaluation of a thousand samples can check."""
MODEST = 0.5
"""A tilt of so many nats is one that can be seen."""


@dataclass(frozen=True)
class Facts:
    """Of a recipe.

    Args:
        differentiable: whether the reward has a gradient.
        learned: whether the reward learns while a method trains.
        method: the recipe's own.
        calibrated: whether the recipe calibrates or adapts its temperature.
        dimension: numbers of a sample.
        conditions: number of prompts or classes that are tuned; 0 for none.
        few_steps: whether the model was distilled to few steps, in words; empty if not.
        beta: temperature of the law that is asked for.
        count: number of base samples that were drawn.
        effective: how many of them carry the weight of that law.
        kl: of that law from the base, in nats, by these samples: no more than their logarithm.
        spread: standard deviation of the reward, in units of beta.
        reachable: a temperature at which a share `REACHABLE` of base samples carries the weight.
        modest: one at which the tilt has `MODEST` nats; None if none has.
        evaluation: what an evaluation lacks to know the law, and the remedy; None if nothing.
    """

    differentiable: bool
    learned: bool
    method: str
    calibrated: bool
    dimension: int
    conditions: int
    few_steps: str
    beta: float
    count: int
    effective: float
    kl: float
    spread: float
    reachable: float
    modest: float | None
    evaluation: tuple[str, str] | None

    @property
    def share(self) -> float:
        """Share of the base samples that carry the weight."""
        return self.effective / self.count

    @property
    def strong(self) -> bool:
        """Whether hardly any base sample resembles the law."""
        return self.share < 0.02 or self.effective < 1.5

    @property
    def weak(self) -> bool:
        """Whether the law is nearly the base."""
        return self.share > 0.98


def facts_of(recipe: Recipe, device: str) -> Facts:
    """Load a recipe's model and reward, and draw a few samples of the base, whatever its method.

    Raises InputError, of one line, if a part cannot be had, and for a reward that tells no samples apart.
    """
    beta, learned = recipe.method.temperature or 1.0, recipe.reward.learned
    method = ScoreAsAction(beta=beta) if learned else TiltMatching(beta=beta)  # they fit any reward
    training = recipe.training.model_copy(update={"calibration_samples": 0, "target_kl": None})
    patient = admit(recipe.model_copy(update={"method": method, "training": training, "optimizer": Optimizer()}), device)
    found = patient.rewards(patient.samples()).cpu()
    members = patient.bound(patient.base).groups(len(found), patient.device)
    groups = [each[each.isfinite()].double() for each in (found[some.cpu()] for some in members) if each.isfinite().any()]
    if not groups or not max(float(each.std(correction=0)) for each in groups) > 0:
        raise InputError(f"advise: the reward is the same for all of {len(found)} base samples: is it the right one?")
    known = numbers(groups, beta)
    return Facts(
        differentiable=recipe.reward.differentiable,
        learned=learned,
        method=recipe.method.name,
        calibrated=bool(recipe.training.calibration_samples or recipe.training.target_kl),
        dimension=patient.batch.x[0].numel(),
        conditions=len(patient.items),
        few_steps=" ".join(few_steps_limits(patient.model, method)),
        beta=beta,
        modest=temperature_of(MODEST, groups),
        **known,
        evaluation=too_few_to_know(recipe.evaluation, known["effective"] / known["count"]),
    )


def numbers(groups: Sequence[Tensor], beta: float) -> dict[str, Any]:
    """What rewards [n] of base samples, in groups with a law each, say of the tilt at beta."""
    count = len(torch.cat(list(groups)))
    spread = math.sqrt(sum(float(each.var(correction=0)) for each in groups) / len(groups))
    return {
        "count": count,
        "effective": effective_samples(exponential_tilt(beta), groups),
        "kl": divergence(1 / beta, groups),
        "spread": spread / beta,
        "reachable": reachable(groups, beta),
    }


def reachable(groups: Sequence[Tensor], beta: float) -> float:
    """The smallest temperature, at least beta, at which a share `REACHABLE` of base samples carries the weight."""
    count = len(torch.cat(list(groups)))
    low, high = beta, beta
    while effective_samples(exponential_tilt(high), groups) < REACHABLE * count:
        low, high = high, 2 * high
    for _ in range(40):
        middle = math.sqrt(low * high)
        enough = effective_samples(exponential_tilt(middle), groups) >= REACHABLE * count
        low, high = (low, middle) if enough else (middle, high)
    return high
