"""Verification of steering: samples of a problem's base, steered without training, beside the tilted law and their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, InstanceOf
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.distances import distances_to_law
from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.models.model import Model
from tiltflow.plugins import find, part_of
from tiltflow.problems import Check, Findings, Problem, Table, to_law
from tiltflow.problems.two_modes import TwoModes, sampler
from tiltflow.problems.verification.quadratic_tilt import QuadraticTilt
from tiltflow.problems.verification.verify import places
from tiltflow.samplers.rollout import sample
from tiltflow.settings import Settings, apply_overrides, parse_yaml, validate
from tiltflow.steering import NamedSteering
from tiltflow.steering.drawing.steered import steered
from tiltflow.streams import stream

NOISE = {"solver": "memoryless", "num_inference_steps": 100}
SAMPLINGS: dict[str, dict[str, Any]] = {"smc": NOISE}
"""How the base is sampled where a kind of steering cannot do with the problem's own sampler."""


class SteeredVerification(Settings):
    """What `tiltflow verify --steer` draws. Every number can be set from the command line."""

    problem: Annotated[InstanceOf[Problem[Any]], BeforeValidator(part_of("problems"))]
    steering: NamedSteering
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the tilted law that samples are compared with, where the steering aims at none of its own."""
    num_samples: Annotated[int, Field(ge=100)] = 8_000
    batch_size: Annotated[int, Field(ge=1)] = 8_192
    """Samples that the base sees at a time."""
    draws: Annotated[int, Field(ge=2)] = 10
    """Exact samples behind each distance and each floor."""
    seed: Annotated[int, Field(ge=0)] = 0


def read_steered(problem: str, steering: str, overrides: Sequence[str] = ()) -> SteeredVerification:
    """The settings of `tiltflow verify PROBLEM --steer STEERING`; see `read_verification`.

    Args:
        steering: a name, or a mapping with its name and settings.

    Raises InputError for an unknown key, a wrong value, an unknown problem or steering, or a problem of another kind.
    """
    posed: type[Any] = find("problems", problem)
    if not issubclass(posed, TwoModes | QuadraticTilt):
        raise InputError(f"verify {problem}: steering is measured on gaussian, mixture and two-modes")
    asked = parse_yaml(steering, "--steer")
    own: dict[str, Any] = asked if isinstance(asked, dict) else {"name": asked}
    kind: type[Settings] = find("steering", str(own.get("name")))
    parts: dict[str, Any] = {
        "steering": kind,
        "problem": posed,
        "problem.sampling": posed.model_fields["sampling"].annotation,
    }
    dotted = [place for each in overrides for place in places(each, parts, dict(posed.letters), SteeredVerification)]
    posed_tree: dict[str, Any] = {"name": problem}
    if (sampling := SAMPLINGS.get(str(own.get("name")))) is not None:
        posed_tree["sampling"] = sampling
    return validate(SteeredVerification, apply_overrides({"problem": posed_tree, "steering": own}, dotted), f"verify {problem}")


def verify_steering(
    settings: SteeredVerification, watch: Callable[[int, int], None] = lambda done, conditions: None
) -> Findings:
    """Draw steered samples, and measure their distance to the tilted law, and to their own where that is known. Distances are
    sliced W2, in units of x; `floor` is that between two exact samples.

    Raises InputError for a sampler that the steering cannot use.
    """
    problem: Any = settings.problem
    steering, count = settings.steering, settings.num_samples
    flow, reward = problem.base_flow(), problem.reward()
    start = time.monotonic()
    found = steered(
        Model(flow, (problem.base().means.shape[1],), problem.sampling),
        reward,
        steering,
        [],
        count,
        batch_size=settings.batch_size,
        seed=settings.seed,
        watch=watch,
    )
    seconds = time.monotonic() - start
    beta = found.temperature or settings.temperature
    generator = stream(settings.seed, "evaluation")
    x_base = sample(flow, problem.draw(count, generator), problem.sampling, generator)
    exact, mean_exact = tilted_law(problem, beta)

    def measure(law: Callable[[int, torch.Generator], Tensor], *several: Tensor) -> Any:
        exactly, directions = stream(settings.seed, "exact"), stream(settings.seed, "directions")
        return distances_to_law(several, law, exactly, draws=settings.draws, directions=directions)

    reached, of_base = measure(exact, found.samples, x_base)
    own = own_law(problem, steering, count)
    to_own = None if own is None else measure(own, found.samples)[0]
    mean = mean_estimate(found.rewards)
    values: dict[str, Any] = {
        "problem": problem.name,
        "steering": steering.name,
        "law": found.law,
        "temperature": beta,
        "distance": reached.distance,
        "floor": reached.floor,
        "floor_std": reached.floor_std,
        "distance_base": of_base.distance,
        "distance_own": None if to_own is None else to_own.distance,
        "reward": mean.value,
        "reward_error": mean.standard_error,
        "reward_exact": mean_exact,
        "effective_sample_size": found.effective_sample_sizes[0],
        "network_evaluations": found.network_evaluations,
        "reward_evaluations": found.reward_evaluations,
        "num_samples": count,
        "seconds": seconds,
        "seed": settings.seed,
        "notes": list(found.notes),
    }
    rows: dict[str, Check | str] = {
        f"sliced W2 to the tilt at beta = {beta:g}": to_law(reached.distance, reached.floor),
        "floor": Check(reached.floor, reached.floor_std),
        **({} if to_own is None else {"to its own law": to_law(to_own.distance, to_own.floor)}),
        "base": Check(of_base.distance),
        "mean reward": Check(mean.value, mean.standard_error, mean_exact, note="of the tilt"),
        "effective sample size": f"{found.effective_sample_sizes[0]:.0f}",
        "own law": found.law,
        "cost of a sample": f"{found.network_evaluations / count:.0f} network evaluations,"
        f" {found.reward_evaluations / count:.1f} rewards; {seconds:.0f} s in all",
        **({"note": " ".join(found.notes)} if found.notes else {}),
    }
    return Findings(values, [Table(f"{steering.name} on {problem.name}", rows)])


def tilted_law(problem: Any, beta: float) -> tuple[Callable[[int, torch.Generator], Tensor], float]:
    """What draws from p_base exp(r / beta), and its mean reward."""
    if isinstance(problem, TwoModes):
        law = problem.law()
        tilted = law.tilt(problem.reward_at(law.points) / beta)
        return sampler(tilted), tilted.expectation(problem.reward_at)
    target = problem.base().tilt(problem.reward(), beta)
    return target.sample, target.expectation(problem.reward())


def own_law(problem: Any, steering: Any, count: int) -> Callable[[int, torch.Generator], Tensor] | None:
    """What draws from the law of so many steered samples, where that is known on the line."""
    exact = steering.law(count).exact
    if exact is None or not isinstance(problem, TwoModes):
        return None
    return sampler(exact(problem.law(), problem.reward_at))
