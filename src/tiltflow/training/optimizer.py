"""Settings of the optimizer: AdamW, the schedule of its learning rate, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from tiltflow.errors import InputError
from tiltflow.settings import Settings

Positive = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Settings):
    """AdamW and its schedule. Settings that are left out are the method's own defaults, such as those of its preset."""

    learning_rate: Positive = 1e-4
    """After the warm-up."""
    lr_scheduler: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: flat, or down to 0 along a cosine."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Steps over which the learning rate grows from 0, linearly."""
    lr_warmup_from_zero: bool = False
    """Take the first step at rate 0, as the schedules of torch and diffusers do, instead of one step further on."""
    adam_beta1: Decay = 0.9
    """Decay of AdamW's mean of the gradients."""
    adam_beta2: Decay = 0.99
    """Decay of AdamW's mean of their squares."""
    adam_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled from the gradient; 0 for none."""
    max_grad_norm: Positive | None = 1.0
    """A longer gradient is shortened to this length; null for none."""


class WithDefaults(Protocol):
    """A method that has defaults for the optimizer."""

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """Settings of `Optimizer` that have other defaults with this method."""
        ...


def fill_optimizer(method: WithDefaults, given: Optimizer | None = None) -> Optimizer:
    """Settings with every key set: as given, else the default of the method, else that of `Optimizer`.

    >>> from tiltflow.methods.adjoint_matching import AdjointMatching
    >>> filled = fill_optimizer(AdjointMatching(preset="paper"), Optimizer(adam_beta1=0.5))
    >>> filled.learning_rate, filled.adam_beta1, filled.max_grad_norm
    (2e-05, 0.5, 1.0)
    """
    own = {} if given is None else given.model_dump(exclude_unset=True)
    return Optimizer(**Optimizer(**{**method.optimizer_defaults, **own}).model_dump())


def check_optimizer(method: WithDefaults, given: Any) -> Optimizer:
    """`fill_optimizer` of an argument of `tune`. Raises InputError, of one line, if it is something else."""
    if given is not None and not isinstance(given, Optimizer):
        raise InputError(f"tune: optimizer must be an Optimizer(learning_rate=.., ..), is {given!r}")
    return fill_optimizer(method, given)


def move_old_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a run with its optimizer's settings in `optimizer`; earlier versions wrote them into `method`."""
    method = tree.get("method")
    if "optimizer" in tree or not isinstance(method, dict):
        return tree
    moved = {key: method[key] for key in Optimizer.model_fields if key in method}
    rest = {key: value for key, value in method.items() if key not in moved}
    return {**tree, "method": rest, "optimizer": moved}


def learning_rate_factor(
    step: int,
    *,
    warmup: int,
    total: int,
    scheduler: Literal["constant", "cosine"] = "cosine",
    from_zero: bool = False,
) -> float:
    """The factor on the learning rate at `step` in 1 .. total: linear up over `warmup` steps, then flat or a cosine to 0.

    >>> [learning_rate_factor(step, warmup=2, total=6) for step in (1, 2, 4, 6)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if step <= warmup:
        return (step - from_zero) / warmup
    if scheduler == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1))) / 2
