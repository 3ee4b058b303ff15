"""A budget of a training: what is counted, what a step costs, how many steps fit, and where to stop."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Literal

from tiltflow.errors import InputError
from tiltflow.formatting import duration
from tiltflow.rewards.functions.counting import CountRewards
from tiltflow.training.trainer import Record

Kind = Literal["network_evaluations", "reward_evaluations", "seconds"]
KINDS: tuple[Kind, ...] = ("network_evaluations", "reward_evaluations", "seconds")
MOST_STEPS = 10_000_000
TRIED, MOST_TRIED = 3, 32
"""Steps from which the cost of a step is known; as many as a batch has, and one more, where these are not too many."""


@dataclass(frozen=True)
class Budget:
    """So much of one kind of cost."""

    kind: Kind
    amount: float

    @classmethod
    def of(cls, network_evaluations: float | None, reward_evaluations: float | None, seconds: float | None) -> Budget:
        """The one that is given. Raises InputError unless exactly one is."""
        given = dict(zip(KINDS, (network_evaluations, reward_evaluations, seconds), strict=True))
        found = {kind: amount for kind, amount in given.items() if amount is not None}
        if len(found) != 1:
            options = ", ".join(f"--{kind.replace('_', '-')}" for kind in found or KINDS)
            raise InputError(f"compare: {'two budgets' if found else 'no budget'} ({options}): give exactly one")
        ((kind, amount),) = found.items()
        if not 0 < amount < math.inf:
            raise InputError(f"compare: --{kind.replace('_', '-')} must be positive, is {amount:g}")
        return cls(kind, amount)

    def share(self, share: float) -> Budget:
        """A part of it."""
        return Budget(self.kind, self.amount * share)

    def __str__(self) -> str:
        """
        >>> print(Budget("network_evaluations", 2e6), Budget("seconds", 90.0), sep=", ")
        2,000,000 network evaluations, 1 min 30 s
        """
        return in_words(self.kind, self.amount)


def in_words(kind: Kind, amount: float) -> str:
    """So much of a kind of cost."""
    return duration(amount) if kind == "seconds" else f"{amount:,.0f} {kind.replace('_', ' ')}"


@dataclass(frozen=True)
class Spent:
    """What a training has cost so far."""

    network_evaluations: int = 0
    """Samples on which the tuned and the base network were evaluated, added up; a gradient is part of its evaluation."""
    reward_evaluations: int = 0
    """Samples on which the reward was evaluated."""
    seconds: float = 0.0
    """Of training, without measurements."""

    def of(self, kind: Kind) -> float:
        """That of one kind."""
        return float(asdict(self)[kind])


class Meter:
    """Counts what a training spends, while it is the context: give it every record."""

    def __init__(self) -> None:
        self.rewards, self.networks = CountRewards(), 0
        self.began = time.perf_counter()

    def __enter__(self) -> Meter:
        self.rewards.__enter__()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.rewards.__exit__(*error)

    def see(self, record: Record) -> Spent:
        """Note the record of a step. Returns what was spent until now."""
        self.networks = record.network_evaluations
        return self.spent

    @property
    def spent(self) -> Spent:
        """What was spent until now; of the networks, until the last record."""
        return Spent(self.networks, self.rewards.total, time.perf_counter() - self.began)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Neither the clock runs nor rewards are counted."""
        stopped = time.perf_counter()
        with self.rewards.paused():
            yield
        self.began += time.perf_counter() - stopped


@dataclass(frozen=True)
class Cost:
    """The cost of optimizer steps: `once + ceil(n / passes) * batch + n * step` for n of them.

    Args:
        once: what comes before the first step and never again, such as a calibration.
        batch: drawing and scoring the samples of a batch.
        step: an optimizer step on it.
        passes: steps on each batch.
    """

    once: float
    batch: float
    step: float
    passes: int

    @classmethod
    def measured(cls, spent: Sequence[float], passes: int) -> Cost:
        """Of what was spent after each of the first steps: the first three, or more where there is to be a second batch among
        them. Without one, the first batch stands for all.

        >>> Cost.measured([30.0, 40.0, 50.0], passes=1)
        Cost(once=20.0, batch=0.0, step=10.0, passes=1)
        >>> Cost.measured([16.0, 17.0, 24.0], passes=2)
        Cost(once=9.0, batch=6.0, step=1.0, passes=2)
        >>> Cost.measured([12.0, 13.0, 14.0], passes=500)
        Cost(once=0.0, batch=11.0, step=1.0, passes=500)
        """
        steps = [after - before for before, after in zip((0.0, *spent), spent, strict=False)]
        step = mean(steps[1:] if passes == 1 else steps[1:passes])
        whole = steps[0] if len(steps) <= passes else step if passes == 1 else steps[passes]
        return cls(max(steps[0] - whole, 0.0), max(whole - step, 0.0), step, passes)

    def of(self, steps: int) -> float:
        """The cost of so many steps."""
        return self.once + math.ceil(steps / self.passes) * self.batch + steps * self.step

    def next(self, steps: int) -> float:
        """The cost of one more step after so many."""
        return self.of(steps + 1) - self.of(steps)

    def steps_within(self, amount: float) -> int:
        """The largest number of steps that costs no more than `amount`; 0 if one costs more.

        >>> Cost(0.0, 11.0, 1.0, 5).steps_within(27.0)
        5
        """
        return bisect_right(range(1, MOST_STEPS), amount, key=self.of)

    def require(self, budget: Budget, what: str) -> int:
        """The steps within a budget. Raises InputError, naming `what`, if one costs more."""
        if not self.of(MOST_STEPS):
            raise InputError(f"compare: {what}: costs no {budget.kind.replace('_', ' ')}; give another budget")
        if not (steps := self.steps_within(budget.amount)):
            raise InputError(
                f"compare: {what}: its first optimizer step alone costs {in_words(budget.kind, self.of(1))}, and there are"
                f" {budget}; give a larger budget, or smaller batches by --set"
            )
        return steps
