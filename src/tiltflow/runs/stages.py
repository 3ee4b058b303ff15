r"""Stages: an outer loop in which the base becomes the last model, for a utility of the whole law.

A reward is a number of each sample. A utility U is one of the law p: its diversity, its distance to another law, the reward of
its worst tenth. Near p_k it is linear, with the slope r_k = dU/dp (p_k), its first variation, which is a reward; so one stage
tunes the last model for r_k and keeps near it:

    p_{k+1} = argmax_q E_q[r_k] - beta KL(q || p_k),      p_{k+1}(x) proportional to p_k(x) exp(r_k(x) / beta),

which is mirror ascent on U with the step 1 / beta (arXiv 2511.22640). If U is the mean of a reward, r_k is that reward in every
stage, and K stages at the temperature K beta are one tilt of p_0 at beta.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from tiltflow.api import Condition, tune
from tiltflow.errors import InputError
from tiltflow.flows.adapter import has_adapter
from tiltflow.models.protocol import GenerativeModel
from tiltflow.streams import stream
from tiltflow.training.callbacks import Callback
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.settings import Training
from tiltflow.user_code import explained, whole_number

M = TypeVar("M", bound=GenerativeModel)
Of = TypeVar("Of", bound=GenerativeModel, contravariant=True)


@runtime_checkable
class Utility(Protocol[Of]):
    """A utility of the law of a model."""

    def first_variation(self, model: Of, seed: int, /) -> Callable[..., Any]:
        """dU/dp (p) at the law p of `model`, up to a constant: a reward as `tiltflow.tune` takes it. `seed` is for the samples
        that it draws."""
        ...


@dataclass(frozen=True)
class Stage(Generic[M]):
    """What a stage has made.

    Args:
        number: from 1.
        model: the tuned model, and the base of the next stage.
        reward: the first variation that it was tuned for.
    """

    number: int
    model: M
    reward: Callable[..., Any]


def stages(
    model: M,
    utility: Utility[M],
    method: Any,
    training: Training | None = None,
    *,
    count: int,
    optimizer: Optimizer | None = None,
    conditions: Sequence[Condition] | None = None,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
) -> Generator[Stage[M], None, None]:
    """Yield a `Stage` after each of `count` stages: `tune` of the last model for the first variation of `utility` there.

    The whole network is trained, in a copy: of a pipeline too. Nothing is written, and there are no checkpoints between stages:
    `stage.model.save(folder)` keeps a model, and `stages` can begin from it. Two calls with the same seed give the same models.

    Args:
        method, training, optimizer, conditions: of each stage, as in `tune`; the temperature is that of one stage.
        callbacks: called with every record of every stage; one that returns True ends its stage.

    Raises InputError for a model with an adapter, which cannot be both the base and what is trained; and what `tune` raises.
    """
    if isinstance(model, GenerativeModel) and has_adapter(model.flow.network):
        raise InputError(
            "stages: the base of a stage is the last model, and this one has an adapter, which would be trained in place; merge"
            " it into the network first (merge_and_unload of peft)"
        )
    if isinstance(utility, type) or not isinstance(utility, Utility):
        raise InputError(f"stages: utility must have first_variation(model, seed) -> reward, is {utility!r}")
    count, seed = whole_number(count, "stages: count", 1), whole_number(seed, "stages: seed")

    def loop(last: M) -> Generator[Stage[M], None, None]:
        for number in range(1, count + 1):
            own = stream(seed, "stage", number).initial_seed()
            with explained("the utility"):
                reward = utility.first_variation(last, stream(seed, "first variation", number).initial_seed())
            last = tune(
                last,
                reward,
                method,
                training,
                optimizer=optimizer,
                conditions=conditions,
                adapter=None,
                seed=own,
                callbacks=callbacks,
            )
            yield Stage(number, last, reward)

    return loop(model)
