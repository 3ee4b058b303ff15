"""Problems with known answers, one file each: a class of settings named after the file, with its model, reward and exact law.

`tiltflow verify NAME` trains any method on it and checks what it reached (`verification/verify.py`). A package of your own adds
one by an entry point of the group `tiltflow.problems`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from tiltflow.control.objective import RunningReward
from tiltflow.flows.flow import Flow
from tiltflow.rewards import Reward
from tiltflow.samplers.sampling import Sampling
from tiltflow.training.batch import Drawn
from tiltflow.training.method import Method
from tiltflow.training.trainer import Record

Tree = Mapping[str, Any]
Exact = Callable[[int, torch.Generator], Tensor]
"""(count, generator) -> exact samples [count, dimension]."""
L = TypeVar("L")
"""How a problem describes its exact law."""


@dataclass(frozen=True)
class Check:
    """A measured number beside theory.

    Args:
        value: what was measured.
        error: its standard error, or the standard deviation of a Monte-Carlo floor.
        theory: the exact value.
        note: what else the number is to be compared with, in words.
        format: of each number.
    """

    value: float
    error: float | None = None
    theory: float | None = None
    note: str = ""
    format: str = ".4f"

    @property
    def z(self) -> float:
        """Standard errors between the value and theory. Raises ValueError without a theory and an error."""
        if self.theory is None or self.error is None:
            raise ValueError("a z-score requires an exact value and a standard error")
        return (self.value - self.theory) / self.error

    @property
    def estimate(self) -> str:
        """The value and its error."""
        return f"{self.value:{self.format}}" + ("" if self.error is None else f" ± {self.error:{self.format}}")

    def __str__(self) -> str:
        """The value and its error, with theory and the note in parentheses."""
        said = [f"exact {self.theory:{self.format}}"] if self.theory is not None else []
        said += [self.note] if self.note else []
        return self.estimate + (f"   ({'; '.join(said)})" if said else "")


def to_law(distance: float, floor: float, of: str = "the Monte-Carlo floor") -> Check:
    """The check of a distance to an exact law against the distance between two exact samples."""
    return Check(distance, note=f"{distance / floor:.2f} x {of}")


@dataclass(frozen=True)
class Table:
    """A titled table of named checks, or of other words.

    Args:
        title: heading of the names.
        rows: each a name and its cells.
        columns: headings of the cells; none for rows of one cell.
    """

    title: str
    rows: Mapping[str, Check | str | Sequence[str]]
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Findings:
    """What the checks of a problem found: numbers by name, for programs, and tables, for people."""

    values: dict[str, Any]
    tables: list[Table] = field(default_factory=list)


@dataclass(frozen=True)
class Defaults:
    """Settings that suit a method on a problem, where nothing else is asked for.

    Args:
        tuning: settings of the method; a preset of the method replaces them.
        method: settings of the method that stay with a preset.
        run: settings of `Verification`, such as the number of iterations.
        optimizer: settings of the optimizer; a preset of the method that has its own replaces them.
    """

    tuning: Tree = field(default_factory=dict)
    method: Tree = field(default_factory=dict)
    run: Tree = field(default_factory=dict)
    optimizer: Tree = field(default_factory=dict)


@dataclass(frozen=True)
class Trained(Generic[L]):
    """A tuned model and all that a problem's checks need.

    Args:
        method: the method that tuned it.
        tuned: the tuned flow.
        base: the flow before.
        law: the exact law that the method aims at.
        record: the last optimizer step.
        iterations: optimizer steps.
        train_batch_size: trajectories of each batch.
        num_samples: how many samples to measure.
        draws: exact samples behind each distance and each floor.
        seed: of all random numbers.
    """

    method: Method
    tuned: Flow
    base: Flow
    law: L
    record: Record
    iterations: int
    train_batch_size: int
    num_samples: int
    draws: int
    seed: int

    @property
    def evaluations_per_trajectory(self) -> float:
        return self.record.network_evaluations / (self.iterations * self.train_batch_size)

    @property
    def cost(self) -> str:
        """Time and network evaluations, in words."""
        return f"{self.record.seconds:.0f} s, {self.evaluations_per_trajectory:.0f} evaluations per trajectory per step"


@runtime_checkable
class Problem(Protocol[L]):
    """A base and a reward for which the law that a method aims at is known exactly.

    `verification.exact_base.ExactBase` has most of it for a base that is a Gaussian mixture.
    """

    name: str
    usual_method: ClassVar[str]
    """The method to train where none is named."""
    letters: ClassVar[Mapping[str, Sequence[str]]]
    """Names for settings that lie elsewhere: `{"N": ["method.num_inference_steps"]}`."""

    @classmethod
    def defaults(cls, method: str) -> Defaults:
        """Settings that suit the method of this name. Raises InputError if it has no known law here."""
        ...

    def base_flow(self) -> Flow:
        """The exact velocity field of the base."""
        ...

    def tuned_flow(self, seed: int) -> Flow:
        """The same field with parameters that can be trained; it is the base's until they are."""
        ...

    def reward(self) -> Reward:
        """A function of samples [batch, *event] -> [batch]."""
        ...

    def draw(self, count: int, generator: torch.Generator) -> Tensor | Drawn:
        """Starting points [count, *event] on the linear path, at `base_flow().noise_time`; with the conditions of samples that
        have any, and the reward at these."""
        ...

    def exact_law(self, method: Method, iterations: int) -> L:
        """The law that the method aims at after so many optimizer steps. Raises InputError if it is not known."""
        ...

    def check(self, trained: Trained[L]) -> Findings:
        """Measure the tuned model against theory."""
        ...


@runtime_checkable
class Controlled(Protocol):
    """A problem whose objective may have a running reward along the paths."""

    def running_reward(self) -> RunningReward | None:
        """f(x, t), a reward per unit of time on the linear path (`tiltflow.control.objective`); None for none."""
        ...


@runtime_checkable
class Comparable(Problem[Any], Protocol):
    """A problem on which `tiltflow compare` can measure methods: at each temperature one law, of which it has exact samples,
    whatever a method itself aims at."""

    @property
    def law_in_words(self) -> str:
        """That law, in words."""
        ...

    @property
    def sampling(self) -> Sampling:
        """The grid on which the tuned flow is sampled, by the solver of the method."""
        ...

    @property
    def groups(self) -> int:
        """How many laws there are, each of a group of samples: one, or one for each observation of a policy. All samples,
        those of `draw` and the exact ones, are of the groups in turn."""
        ...

    def base_sampler(self) -> Exact:
        """Exact samples of the base."""
        ...

    def tilted_sampler(self, beta: float) -> Exact:
        """Exact samples of the law at a temperature: p_base(x) exp(r(x) / beta), or that of the best control. Raises InputError
        where there is none."""
        ...

    def admit(self, method: Method) -> None:
        """Raise InputError for a method that cannot be trained on the problem, or that has other samples."""
        ...
