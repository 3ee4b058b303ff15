"""A function or a module of the user as a reward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, cast

from torch import Tensor, nn

from tiltflow.errors import InputError
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.rewards import LearnedReward, Reward
from tiltflow.rewards.functions.latents import OfLatents
from tiltflow.rewards.functions.prompted import OfPrompts


@dataclass(frozen=True)
class InEvalMode:
    """A module called in eval mode: a reward is one function, without dropout and batch statistics."""

    module: nn.Module

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with eval_mode(self.module):
            return self.module(*arguments, **named)


def from_function(function: Callable[..., Any], name: str = "the reward") -> Reward:
    """A function of the user as a reward. Beside the images, its first argument, it may have arguments called `prompts`,
    `metadata`, `labels` and `sources`: they are passed by name, so their order does not matter. An argument `latents` in place
    of the images gets what these are decoded from, and training then decodes nothing. It returns [batch] floats, or a pair of
    them and anything else, as DDPO's rewards do. A module is called in eval mode, and then put back into its own mode.

    Raises InputError, naming it as `name`, if it needs any other argument.
    """
    if not callable(function):
        raise InputError(f"{name} must be a function of samples [batch, ..] -> [batch], is {type(function).__name__}")
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # written in C: only the images are passed
        return cast(Reward, function)
    parameters = [p for p in signature.parameters.values() if p.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    asks = tuple(p.name for p in parameters if p.name in ("prompts", "metadata", "labels", "sources"))
    others = [p for p in parameters if p.name not in asks]
    images = next((p for p in others if p.name in ("images", "latents")), others[0] if others else None)
    needed = [p.name for p in others if p is not images and p.default is Parameter.empty]
    any_number = any(p.kind is Parameter.VAR_POSITIONAL for p in signature.parameters.values())
    if needed or (images is None and not any_number):
        got = ", ".join(signature.parameters) or "none"
        can = "the images, under any name, or `latents`, and `prompts`, `metadata`, `labels` and `sources`"
        raise InputError(f"{name} has the arguments ({got}); it can have {can}")
    if isinstance(function, nn.Module) and not isinstance(function, LearnedReward):
        function = InEvalMode(function)
    latents = images is not None and images.name == "latents" and not isinstance(function, LearnedReward)
    if not asks and (images is None or images is parameters[0]):
        return OfLatents(cast(Reward, function)) if latents else cast(Reward, function)

    def score(x: Tensor, **told: Any) -> Any:
        values = told if images is None else {images.name: x, **told}
        ordered = [values.pop(p.name) for p in parameters if p.kind is Parameter.POSITIONAL_ONLY and p.name in values]
        return function(*([x] if images is None else []), *ordered, **values)

    reward: Reward = OfPrompts(score, asks) if asks else score
    return OfLatents(reward) if latents else reward
