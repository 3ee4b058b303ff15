"""Verification of any problem; that of utilities tunes in stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tiltflow.errors import InputError
from tiltflow.models.model import Model
from tiltflow.problems import Findings
from tiltflow.problems.utility import Utility
from tiltflow.problems.verification import verify as verification
from tiltflow.problems.verification.verify import Fitted, Verification
from tiltflow.runs.staged.of_law import OfLaw
from tiltflow.runs.staged.outer_loop import stages
from tiltflow.training.settings import Training
from tiltflow.training.trainer import Record

Watch = Callable[[Record], None]


def steps(settings: Verification) -> int:
    """Optimizer steps of a verification, in all its stages."""
    problem: object = settings.problem
    return settings.iterations * (problem.stages if isinstance(problem, Utility) else 1)


def verify(settings: Verification, watch: Watch = lambda record: None) -> Findings:
    """`tiltflow.problems.verification.verify.verify`, in stages where the problem asks for them."""
    problem: object = settings.problem
    return verification.verify(settings, watch, in_stages if isinstance(problem, Utility) else verification.once)


def in_stages(settings: Verification, watch: Watch) -> Fitted:
    """Tune for the utility of the problem. The records of a stage go on from those of the last one.

    Raises InputError, before it trains, for a method that cannot.
    """
    problem: Any = settings.problem
    training = Training(
        max_train_steps=settings.iterations, train_batch_size=settings.train_batch_size, ema_decay=settings.ema_decay
    )
    utility = OfLaw(
        problem.posed,
        rewards=problem.rewards(),
        num_samples=problem.law_samples,
        eps=problem.eps,
        log_odds=problem.log_odds if problem.labelled else None,
    )
    base, watcher = problem.base_flow(), Onward(watch)
    found = stages(
        Model(problem.tuned_flow(settings.seed), (problem.dimension,), problem.sampling, class_names=problem.class_names),
        utility,
        priced(settings.method, problem),
        training,
        count=problem.stages,
        optimizer=settings.optimizer,
        callbacks=[watcher],
        progress=False,
        seed=settings.seed,
        **({"base": "first", "mixing": problem.mixing} if problem.from_first else {"base": "last", "price": problem.alpha}),
    )
    *_, stage = found
    assert watcher.last is not None
    return Fitted(base, stage.model.flow, watcher.last, steps(settings))


def priced(method: Any, problem: Utility) -> Any:
    """The method at the temperature of a stage."""
    settings: Any = type(method).model_fields.get("beta")
    if settings is None:
        raise InputError(f"verify utility: {method.name} has no temperature, and that of a stage is the price of the KL")
    if method.beta not in (settings.default, problem.alpha):
        raise InputError("verify utility: the temperature of a stage is alpha, the price of the KL: leave beta out")
    beta = problem.alpha if problem.from_first else (problem.alpha or 1.0) / problem.mixing
    return method.model_copy(update={"beta": beta})


class Onward:
    """Sees the records of stage after stage, and tells of them as of one training."""

    def __init__(self, watch: Watch):
        self.watch = watch
        self.before: Record | None = None
        self.last: Record | None = None

    def __call__(self, record: Record) -> None:
        if record.step == 1:
            self.before = self.last
        past = self.before
        self.last = record if past is None else added(past, record)
        self.watch(self.last)


def added(past: Record, record: Record) -> Record:
    """A record, with the cost of what went before it."""
    return replace(
        record,
        step=past.step + record.step,
        seconds=past.seconds + record.seconds,
        network_evaluations=past.network_evaluations + record.network_evaluations,
        samples_drawn=past.samples_drawn + record.samples_drawn,
    )
