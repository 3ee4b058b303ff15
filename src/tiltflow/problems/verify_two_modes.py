"""Verification on two modes in one dimension under a bounded reward, where every law is known: the tilted law at any
temperature, and the law that reward-weighted flow matching reaches instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import distance_to_law, mean_estimate, sliced_w2
from tiltflow.flows.flow import Flow
from tiltflow.laws.induced_law import Array, Law, velocity_distance
from tiltflow.laws.problems import CorrectedVelocity, ExactVelocity, TwoModes
from tiltflow.networks.mlp import Mlp
from tiltflow.plugins import part_of
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Settings
from tiltflow.streams import new_network, stream
from tiltflow.training.trainer import Record, train

Count = Annotated[int, Field(ge=1)]


class TwoModesVerification(Settings):
    """What `tiltflow verify two-modes` runs. Every number can be set from the command line."""

    problem: TwoModes = TwoModes()
    method: Annotated[Any, BeforeValidator(part_of("methods"))]
    iterations: Count = 500
    """Optimizer steps."""
    train_batch_size: Count = 512
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    hidden: Count = 128
    """Width of the learned correction to the exact velocity, a perceptron of `layers` layers."""
    layers: Count = 3
    sampling: Sampling = Sampling(solver="heun")
    """How the tuned flow is sampled for the distances."""
    num_samples: Annotated[int, Field(ge=100)] = 20_000
    draws: Annotated[int, Field(ge=2)] = 10
    """Exact samples behind each distance and each floor."""
    seed: Annotated[int, Field(ge=0)] = 0


def verify_two_modes(settings: TwoModesVerification, watch: Callable[[Record], None] = lambda record: None) -> dict[str, Any]:
    """Train, then measure the distance to the method's own target and to the tilted law. `watch` is shown every record.

    Distances are 2-Wasserstein, in units of x; `floor` is that between two exact samples. Raises InputError, before it trains,
    if the method's law is not known or does not exist.
    """
    problem, method = settings.problem, settings.method
    mixture, reward = problem.base(), problem.reward()
    law = problem.law()
    tilted = law.tilt(method.log_tilt(torch.from_numpy(problem.reward_at(law.points)), settings.iterations).numpy())
    try:
        own = method.exact_law(law, problem.reward_at, settings.iterations) if hasattr(method, "exact_law") else tilted
    except ValueError as error:
        raise InputError(f"verify two-modes: {error}") from None
    base = Flow(ExactVelocity(mixture))
    correction = new_network(Mlp(dimension=1, hidden=settings.hidden, layers=settings.layers), settings.seed)
    tuned = Flow(CorrectedVelocity(ExactVelocity(mixture), correction))

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randn(settings.train_batch_size, 1, generator=generator)

    record = None
    for record in train(
        tuned, base, method, reward, draw, max_train_steps=settings.iterations, seed=settings.seed, ema_decay=settings.ema_decay
    ):
        watch(record)
    assert record is not None

    generator = stream(settings.seed, "evaluation")
    noise = torch.randn(settings.num_samples, 1, generator=generator)
    x = sample(tuned, noise, settings.sampling, generator)
    x_base = sample(base, noise, settings.sampling, generator)
    directions = stream(settings.seed, "directions")
    to_own = distance_to_law(x, sampler(own), generator, directions=directions, draws=settings.draws)
    mean = mean_estimate(reward(x))
    return {
        "problem": problem.name,
        "method": method.name,
        "target_law": method.target_law(record.step),
        "laws": {name: describe(q, law, problem.reward_at) for name, q in (("base", law), ("own", own), ("tilted", tilted))},
        "reached": {
            "mean": x.mean().item(),
            "variance": x.var().item(),
            "reward": mean.value,
            "positive": (x > 0).double().mean().item(),
            "w2_to_base": distance_to_law(x, sampler(law), generator, directions=directions, draws=settings.draws).distance,
        },
        "reward_error": mean.standard_error,
        "distance": to_own.distance,
        "floor": to_own.floor,
        "floor_std": to_own.floor_std,
        "distance_tilted": distance_to_law(x, sampler(tilted), generator, directions=directions, draws=settings.draws).distance,
        "distance_base": sliced_w2(x_base, sampler(own)(len(x_base), generator), torch.ones(1, 1)),
        "own_to_tilted": own.w2(tilted),
        "effective_sample_size": record.metrics.get("effective_sample_size"),
        "iterations": settings.iterations,
        "network_evaluations": record.network_evaluations,
        "seconds": record.seconds,
        "seed": settings.seed,
    }


def sampler(law: Law) -> Callable[[int, torch.Generator], Tensor]:
    """Exact samples [count, 1] of a law, by its quantiles."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        levels = torch.rand(count, generator=generator, dtype=torch.float64)
        return torch.from_numpy(law.quantiles(levels.numpy()))[:, None]

    return draw


def describe(law: Law, base: Law, reward: Callable[[Array], Array]) -> dict[str, float]:
    """What a law is, in numbers: `penalty` is the integral of E|v - v_base|^2 for its own velocity."""
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
