"""Verification: train a method on a problem whose answer is known, and say how far from it the result is."""

# Mutation tests: test_chain_optimum.py test_verify.py

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from tiltflow.errors import InputError, did_you_mean
from tiltflow.evaluation.estimates import DistanceToLaw, distance_to_law, exact_w2, mean_estimate
from tiltflow.flows.flow import Flow
from tiltflow.laws import chain_optimum
from tiltflow.laws.lqg import Lqg
from tiltflow.laws.problems import (
    CorrectedVelocity,
    ExactVelocity,
    Gaussian,
    GaussianMixture,
    Mixture,
    QuadraticReward,
    TwoModes,
    optimal_control,
    span_of_tilt,
)
from tiltflow.methods import Tilting
from tiltflow.networks.mlp import Mlp
from tiltflow.plugins import find, part_of
from tiltflow.problems.verify_lqg import LqgVerification, verify_lqg
from tiltflow.problems.verify_two_modes import TwoModesVerification, verify_two_modes
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Settings, apply_overrides, validate
from tiltflow.streams import new_network, stream
from tiltflow.training.trainer import Record, train

Count = Annotated[int, Field(ge=1)]

PROBLEMS: dict[str, type[Settings]] = {"gaussian": Gaussian, "lqg": Lqg, "mixture": Mixture, "two-modes": TwoModes}

# What suits problems of a few dimensions; the methods' own defaults suit large networks.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "adjoint-matching": {"learning_rate": 5e-3},
    "score-as-action": {"learning_rate": 5e-3, "critic": {"train_batch_size": 128}},
    "orw-cfm-w2": {"learning_rate": 3e-3, "regression_batch_size": 1024},
}
# ORW-CFM-W2 learns in rounds, each from many samples: without a penalty four of them, whose law is p exp(r). A round must be
# fitted well there, as nothing pulls the law back.
ROUNDS: dict[str, dict[str, Any]] = {
    "method": {"alpha": 0, "tau": 0.25, "num_passes": 800, "regression_batch_size": 4096},
    "run": {"iterations": 3200, "train_batch_size": 32_768, "ema_decay": 0.99},
}
ROUNDS_TWO_MODES: dict[str, dict[str, Any]] = {
    "method": {"num_passes": 30},
    "run": {"iterations": 1500, "train_batch_size": 8192, "ema_decay": 0.97},
}
LQG_DEFAULTS: dict[str, dict[str, Any]] = {
    "adjoint-matching": {"beta": 0.5, "solver": "euler-maruyama", "learning_rate": 2e-2},
    "score-as-action": {
        "beta": 0.5,
        "solver": "euler-maruyama",
        "learning_rate": 2e-2,
        "estimator": "temporal-difference",  # its optimum is that of the chain; the closed form's is off by O(1 / N)
        "critic": {"network": {"name": "quadratic"}, "learning_rate": 2e-2},
    },
}
# the letters in which the problem is written
LQG_LETTERS = {"lambda": ["method.beta"], "N": ["method.num_inference_steps"], "eta": ["problem.eta", "method.eta"]}


class Verification(Settings):
    """What `tiltflow verify` runs. Every number can be set from the command line."""

    problem: Annotated[Gaussian | Mixture, Field(discriminator="name")]
    method: Annotated[Any, BeforeValidator(part_of("methods"))]
    iterations: Count = 500
    """Optimizer steps."""
    train_batch_size: Count = 512
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    hidden: Count = 128
    """Width of the learned correction to the exact velocity, a perceptron of `layers` layers."""
    layers: Count = 3
    sampling: Sampling = Sampling()
    """How the tuned flow is sampled for the distances."""
    num_samples: Annotated[int, Field(ge=100)] = 20_000
    num_samples_w2: Annotated[int, Field(ge=100)] = 2_000
    """Points for the exact Wasserstein distance, whose cost grows with their square."""
    draws: Annotated[int, Field(ge=2)] = 10
    """Exact samples behind each distance and each floor."""
    seed: Annotated[int, Field(ge=0)] = 0


AnyVerification = Verification | LqgVerification | TwoModesVerification


def read_verification(problem: str, method: str, overrides: Sequence[str]) -> AnyVerification:
    """The settings of `tiltflow verify`. A key without a dot is looked up in the run, the problem, the method and the
    sampling, in that order, so `scale=0.3` and `problem.scale=0.3` are the same.

    Raises InputError for an unknown key, a wrong value or an unknown method.
    """
    parts: dict[str, type[Settings]] = {"problem": PROBLEMS[problem], "method": find("methods", method)}
    defaults = {**METHOD_DEFAULTS.get(method, {}), **(LQG_DEFAULTS.get(method, {}) if problem == "lqg" else {})}
    if any(override.partition("=")[0].strip() in ("preset", "method.preset") for override in overrides):
        # a preset is asked for as it was published; only where it is applied stays ours
        defaults = {key: value for key, value in defaults.items() if key in ("beta", "solver")}
    if problem == "lqg" and "beta" not in parts["method"].model_fields:
        raise InputError(f"verify lqg is for methods that control a sampler at a price beta, {method} does not; use two-modes")
    tree: dict[str, Any] = {"problem": {"name": problem}, "method": {"name": method, **defaults}}
    if method == "orw-cfm-w2":
        rounds = ROUNDS_TWO_MODES if problem == "two-modes" else ROUNDS
        tree["method"] |= rounds["method"]
        tree |= rounds["run"]
    kind: type[AnyVerification] = Verification
    letters: dict[str, list[str]] = {}
    if problem == "lqg":
        kind, letters = LqgVerification, LQG_LETTERS
    else:
        kind = TwoModesVerification if problem == "two-modes" else Verification
        parts["sampling"] = Sampling
    dotted = []
    for override in overrides:
        key, equals, value = override.partition("=")
        key = key.strip()
        if key in letters:
            dotted += [f"{place}{equals}{value}" for place in letters[key]]
            continue
        first = key.partition(".")[0]
        places = [name for name, part in parts.items() if first in part.model_fields]
        if first in kind.model_fields:
            dotted.append(f"{key}{equals}{value}")
        elif places:
            dotted.append(f"{places[0]}.{key}{equals}{value}")
        else:
            known = {*kind.model_fields, *(field for part in parts.values() for field in part.model_fields), *letters}
            raise InputError(f"--set {override}: {first!r} is not a setting{did_you_mean(first, known)}")
    return validate(kind, apply_overrides(tree, dotted), f"verify {problem}")


def run_verification(settings: AnyVerification, watch: Callable[[Record], None] = lambda record: None) -> dict[str, Any]:
    """Train and measure, on whichever problem."""
    if isinstance(settings, TwoModesVerification):
        return verify_two_modes(settings, watch)
    return verify_lqg(settings, watch) if isinstance(settings, LqgVerification) else verify(settings, watch)


def verify(settings: Verification, watch: Callable[[Record], None] = lambda record: None) -> dict[str, Any]:
    """Train, then measure. `watch` is shown every training record.

    Distances are 2-Wasserstein, in units of x, between `num_samples` samples of the memoryless SDE (or the solver asked
    for) and as many exact samples of the target law; `floor` is the same between two exact samples. `distance` is over random
    directions of the space, in which many dimensions hide a tilt; `distance_span` over those of the `span` dimensions in which
    the tilt moves anything but variances.
    """
    problem, method = settings.problem, settings.method
    law, reward = problem.base(), problem.reward()
    beta = temperature(method, settings.iterations)
    target = law.tilt(reward, beta)
    base = Flow(ExactVelocity(law))
    correction = new_network(Mlp(dimension=problem.dimension, hidden=settings.hidden, layers=settings.layers), settings.seed)
    tuned = Flow(CorrectedVelocity(ExactVelocity(law), correction))

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randn(settings.train_batch_size, problem.dimension, generator=generator)

    record = None
    for record in train(
        tuned, base, method, reward, draw, max_train_steps=settings.iterations, seed=settings.seed, ema_decay=settings.ema_decay
    ):
        watch(record)
    assert record is not None

    generator = stream(settings.seed, "evaluation")
    noise = torch.randn(settings.num_samples, problem.dimension, generator=generator)
    x_base = sample(base, noise, settings.sampling, generator)
    x = sample(tuned, noise, settings.sampling, generator)
    x_ode = sample(tuned, noise, Sampling(solver="heun", num_inference_steps=settings.sampling.num_inference_steps), generator)

    def measure(x: Tensor, exact: Callable[[int, torch.Generator], Tensor] = target.sample, **options: Any) -> DistanceToLaw:
        # against the same exact samples along the same directions, so that what is compared differs in x alone
        directions = stream(settings.seed, "directions")
        options = {"draws": settings.draws, **options}
        return distance_to_law(x, exact, stream(settings.seed, "exact"), directions=directions, **options)

    sliced = measure(x)
    w2 = measure(x[: settings.num_samples_w2], distance=exact_w2, draws=min(settings.draws, 3))
    span = span_of_tilt(law, target, reward)
    spanned = measure(x.double() @ span, target.projected(span).sample)
    mean = mean_estimate(reward(x))
    return {
        "problem": problem.name,
        "method": method.name,
        "distance": sliced.distance,
        "floor": sliced.floor,
        "floor_std": sliced.floor_std,
        "distance_base": measure(x_base).distance,
        "distance_ode": measure(x_ode).distance,
        "distance_span": spanned.distance,
        "floor_span": spanned.floor,
        "floor_span_std": spanned.floor_std,
        "span": span.shape[1],
        "dimension": problem.dimension,
        "w2": w2.distance,
        "w2_floor": w2.floor,
        "reward": mean.value,
        "reward_error": mean.standard_error,
        "reward_exact": target.expectation(reward),
        "reward_base": law.expectation(reward),
        **best_of_chain(method, law, reward, beta),
        "control_error": control_error(tuned, law, target, generator),
        "loss": record.metrics["loss"],
        "path_kl": record.metrics.get("path_kl"),
        "path_kl_exact": target.expectation(reward) / beta - law.log_partition(reward, beta),
        "iterations": settings.iterations,
        "network_evaluations": record.network_evaluations,
        "evaluations_per_trajectory": record.network_evaluations / (settings.iterations * settings.train_batch_size),
        "seconds": record.seconds,
        "seed": settings.seed,
    }


def temperature(method: Any, steps: int) -> float:
    """The beta of the tilted law that a method samples after so many optimizer steps. Raises InputError where its law is
    another one."""
    if not hasattr(method, "exact_law"):
        return float(method.beta)
    if method.alpha > 0 or method.online_fraction < 1 or method.weight != "exponential":
        raise InputError(
            f"on this problem the law of {method.name} is known for alpha = 0, online_fraction = 1 and exponential weights"
            f" only; `tiltflow verify two-modes --method {method.name}` knows them all"
        )
    return 1 / float(method.log_tilt(torch.ones(1), steps))


def best_of_chain(method: Any, law: GaussianMixture, reward: QuadraticReward, beta: float) -> dict[str, Any]:
    """`chain_optimum`: what the best control of the method's own chain reaches, so that a run that has not converged is told
    from a chain that cannot come closer. None, with the reason, where it is not computed.

    `distance` is W2 to the tilted law in one dimension, sliced W2 in two; it has no Monte-Carlo floor.
    """
    priced = method.priced_chain() if isinstance(method, Tilting) else None
    if priced is None:
        return {"chain_optimum": None, "chain_optimum_missing": "the method does not control a chain at a price"}
    chain, energy = priced
    try:
        best = chain_optimum.solve(chain, energy, law, reward, beta)
    except InputError as error:
        return {"chain_optimum": None, "chain_optimum_missing": str(error)}
    found = {
        "distance": best.sliced_w2(law.tilt(reward, beta)),
        "reward": best.reward,
        "path_kl": best.path_kl,
        "num_inference_steps": len(chain),
    }
    return {"chain_optimum": found, "chain_optimum_missing": None}


@torch.no_grad()
def control_error(tuned: Flow, law: GaussianMixture, target: GaussianMixture, generator: torch.Generator) -> float:
    """Relative error of the learned control, sqrt(E|u - u*|^2 / E|u*|^2), over the exact tilted process at 39 times.

    The tilted process is memoryless, so x_t = t x_1 + (1 - t) x_0 with x_1 from the target and x_0 fresh noise is exact.
    Absolute, not relative, where the optimal control is zero.
    """
    wrong, right = 0.0, 0.0
    for t in time_grid(40)[1:-1]:
        x1 = target.sample(2000, generator)
        x = (t * x1 + (1 - t) * torch.randn(x1.shape, generator=generator, dtype=torch.float64)).float()
        best = optimal_control(law, target, x, t)
        learned = 2 / (2 * (1 - t) / t).sqrt().item() * (tuned(x, t) - law.velocity(x, t))
        wrong += (learned - best).square().sum().item()
        right += best.square().sum().item()
    return float((wrong / right) ** 0.5) if right > 0 else float((wrong / (39 * 2000)) ** 0.5)
