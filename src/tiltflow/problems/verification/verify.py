"""Verification: train a method on a problem whose answer is known, and check how far from it the result is."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, InstanceOf

from tiltflow.errors import InputError, did_you_mean
from tiltflow.flows.flow import Flow
from tiltflow.plugins import find, part_of
from tiltflow.problems import Controlled, Findings, Problem, Trained, Tree
from tiltflow.settings import Settings, apply_overrides, validate
from tiltflow.training.method import NamedMethod
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.trainer import BatchEnd, Record, train

Count = Annotated[int, Field(ge=1)]


class Verification(Settings):
    """What `tiltflow verify` runs. Every number can be set from the command line."""

    problem: Annotated[InstanceOf[Problem[Any]], BeforeValidator(part_of("problems"))]
    method: NamedMethod
    optimizer: Optimizer = Optimizer()
    iterations: Count = 500
    """Optimizer steps."""
    train_batch_size: Count = 512
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    num_samples: Annotated[int, Field(ge=100)] = 20_000
    draws: Annotated[int, Field(ge=2)] = 10
    """Exact samples behind each distance and each floor."""
    seed: Annotated[int, Field(ge=0)] = 0


def read_verification(problem: str, method: str | None = None, overrides: Sequence[str] = ()) -> Verification:
    """The settings of `tiltflow verify`. A key without a dot is looked up in the run, the problem, the method, the optimizer
    and the sampling of the problem, in that order, so `scale=0.3` and `problem.scale=0.3` are the same.

    Args:
        method: by default the problem's usual one.

    Raises InputError for an unknown key, a wrong value, or an unknown problem or method.
    """
    posed: type[Any] = find("problems", problem)
    method = method or posed.usual_method
    parts: dict[str, type[Settings]] = {"problem": posed, "method": find("methods", method), "optimizer": Optimizer}
    if "sampling" in posed.model_fields:
        parts["problem.sampling"] = posed.model_fields["sampling"].annotation
    defaults = posed.defaults(method)
    dotted = [place for override in overrides for place in places(override, parts, posed.letters)]

    def read(tuning: Tree, optimizer: Tree) -> Verification:
        own = {"name": method, **tuning, **defaults.method}
        tree = {"problem": {"name": problem}, "method": own, "optimizer": dict(optimizer), **defaults.run}
        return validate(Verification, apply_overrides(tree, dotted), f"verify {problem}")

    if not any(override.partition("=")[0].strip() in ("preset", "method.preset") for override in overrides):
        return read(defaults.tuning, defaults.optimizer)
    published = read({}, {})
    return published if published.method.optimizer_defaults else read({}, defaults.optimizer)


def places(
    override: str, parts: dict[str, type[Settings]], letters: dict[str, Sequence[str]], run: type[Settings] = Verification
) -> list[str]:
    """An override with the dotted names of what it sets. Raises InputError if there is none."""
    key, equals, value = override.partition("=")
    key = key.strip()
    first = key.partition(".")[0]
    if key in letters:
        return [f"{place}{equals}{value}" for place in letters[key]]
    if first in run.model_fields:
        return [f"{key}{equals}{value}"]
    for name, part in parts.items():
        if first in part.model_fields:
            return [f"{name}.{key}{equals}{value}"]
    known = {*run.model_fields, *(field for part in parts.values() for field in part.model_fields), *letters}
    raise InputError(f"--set {override}: {first!r} is not a setting{did_you_mean(first, known)}")


@dataclass(frozen=True)
class Fitted:
    """What training has made: the flow before and after, the last record, and the number of optimizer steps."""

    base: Flow
    tuned: Flow
    record: Record
    iterations: int


Watch = Callable[[Record], None]


def loop(
    settings: Verification, tuned: Flow, base: Flow, on_batch_end: Callable[[BatchEnd], None] = lambda end: None
) -> Generator[Record, None, None]:
    """Train the flow `tuned` of the problem beside its base: see `tiltflow.training.trainer.train`."""
    problem = settings.problem
    return train(
        tuned,
        base,
        settings.method,
        problem.reward(),
        lambda generator: problem.draw(settings.train_batch_size, generator),
        max_train_steps=settings.iterations,
        optimizer=settings.optimizer,
        seed=settings.seed,
        start=base.noise_time,
        ema_decay=settings.ema_decay,
        on_batch_end=on_batch_end,
        running=problem.running_reward() if isinstance(problem, Controlled) else None,
    )


def once(settings: Verification, watch: Watch) -> Fitted:
    """Train the method for the reward of the problem."""
    problem = settings.problem
    base, tuned = problem.base_flow(), problem.tuned_flow(settings.seed)
    record = None
    for record in loop(settings, tuned, base):
        watch(record)
    assert record is not None
    return Fitted(base, tuned, record, settings.iterations)


def verify(
    settings: Verification,
    watch: Watch = lambda record: None,
    fit: Callable[[Verification, Watch], Fitted] = once,
) -> Findings:
    """Train the method on the problem, then check what it reached. `watch` sees every training record.

    Raises InputError, before it trains, if the method's law is not known.
    """
    problem, method = settings.problem, settings.method
    law = problem.exact_law(method, settings.iterations)
    fitted = fit(settings, watch)
    record = fitted.record
    run = settings.model_dump(include={"train_batch_size", "num_samples", "draws", "seed"})
    trained = Trained(method, fitted.tuned, fitted.base, law, record, iterations=fitted.iterations, **run)
    found = problem.check(trained)
    values = {
        "problem": problem.name,
        "method": method.name,
        **found.values,
        "iterations": settings.iterations,
        "network_evaluations": record.network_evaluations,
        "evaluations_per_trajectory": trained.evaluations_per_trajectory,
        "seconds": record.seconds,
        "seed": settings.seed,
    }
    return Findings(values, found.tables)
