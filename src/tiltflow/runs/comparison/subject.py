"""What methods are compared on, and one training of it: the same for a problem with a known answer and for a recipe."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tiltflow.methods import Tilting
from tiltflow.samplers.grid import Start
from tiltflow.samplers.sampling import Sampling
from tiltflow.training.method import Method
from tiltflow.training.trainer import BatchEnd, Record

OnBatchEnd = Callable[[BatchEnd], None]


@dataclass(frozen=True)
class Chosen:
    """A method with its settings in a comparison.

    Args:
        name: of the method.
        settings: overrides of its own defaults, `key=value`.
        factor: on its learning rate.
        seed: of the training, and of what measures it.
        steps: of the optimizer, over which its schedules extend.
    """

    name: str
    settings: tuple[str, ...] = ()
    factor: float = 1.0
    seed: int = 0
    steps: int = 100


class Trial(Protocol):
    """A training that can begin, once."""

    method: Method
    learning_rate: float

    @property
    def start(self) -> Start:
        """Where sampling begins."""
        ...

    def loop(self, on_batch_end: OnBatchEnd) -> Generator[Record, None, None]:
        """Train; when it ends or is closed, the weights are their moving average."""
        ...

    def measure(self, keep: Path | None, *, whole: bool) -> dict[str, Any]:
        """Measure the model as its weights are now: `reward`, `distance` to p_base exp(r / beta), `diversity`, and what else
        is known; None for what is not.

        Args:
            keep: the folder of the comparison, to write pictures into, or None.
            whole: whether to measure what takes long, too.
        """
        ...


class Subject(Protocol):
    """What methods are compared on; it can be pickled."""

    @property
    def name(self) -> str: ...

    @property
    def beta(self) -> float:
        """Temperature of the target law."""
        ...

    @property
    def law(self) -> str:
        """The target law, in words."""
        ...

    @property
    def black_box(self) -> bool:
        """Whether the reward has no gradient."""
        ...

    def admit(self, chosen: Chosen) -> None:
        """Raise InputError, of one line, for a method that its settings show not to fit; nothing is loaded."""
        ...

    def trial(self, chosen: Chosen, device: str) -> Trial:
        """A training of the method. Raises InputError, of one line, if it does not fit."""
        ...

    def as_tree(self) -> Mapping[str, Any]:
        """All that it depends on."""
        ...


def at_temperature(method: Method, beta: float) -> Method:
    """The method at the temperature of the comparison; as it is, where it has none.

    >>> from tiltflow.methods.ddpo import Ddpo
    >>> from tiltflow.methods.dpok import Dpok
    >>> at_temperature(Dpok(), 0.5).temperature, at_temperature(Ddpo(), 0.5).temperature
    (0.5, None)
    """
    return method if method.temperature is None else method.at_temperature(beta)


def sampled_by(method: Method) -> dict[str, Any]:
    """The changes of a sampling that make it one by the method's own solver, on the same grid; in one step if the
    method makes a sampler of one."""
    own = method.sampling
    return {"solver": own.solver, "eta": own.eta, **({"num_inference_steps": 1} if own.num_inference_steps == 1 else {})}


class Law(Tilting):
    """The law that all methods are measured against, p_base exp(r / beta), under the name and with the sampler of one."""

    name: str
    drawn: Sampling

    @property
    def sampling(self) -> Sampling:
        """That of the method."""
        return self.drawn
