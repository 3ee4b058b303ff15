"""Rewards, one file each: a class of settings named after the file, with `build()`. A new reward is a new file.

A reward takes x [batch, *event], images [batch, channels, height, width] in [-1, 1] for most, and returns [batch]: one number
for each sample, higher is better, no sample looking at its neighbours. A plain function is a reward. Methods that need its
gradient get it from autograd. A reward may ask for the prompts of the samples and their metadata; and it may learn, while a
method trains, from the samples that it is shown after each iteration.

A reward is the user's code: it gets a copy of the samples, which it may write into, and what it returns is copied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import Parameter
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from pydantic import BeforeValidator
from torch import Tensor, nn

from tiltflow import processes
from tiltflow.errors import InputError, NonFiniteError, UserCodeError
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.flows.field import Which
from tiltflow.flows.interpolant import expand
from tiltflow.plugins import part_of
from tiltflow.user_code import explained

Metadata = Mapping[str, Any]
"""The other columns of a prompt in its file, by name."""
NonFiniteRewards = Literal["error", "drop"]
"""Handling of samples whose reward is NaN or infinite: the run ends, or they are left out."""
FEWEST = 2
"""The fewest samples that may be left where others are left out."""
Told = TypeVar("Told")


class Reward(Protocol):
    """x [batch, *event] -> [batch]."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class RewardSettings(Protocol):
    """Settings of a reward. Some of what they say depends on the settings, so read it on an instance."""

    @property
    def name(self) -> str:
        """The name by which a recipe asks for it."""
        ...

    @property
    def description(self) -> str:
        """One line for the report: what is measured, its range and sign."""
        ...

    @property
    def unit(self) -> str:
        """The unit of the numbers."""
        ...

    @property
    def differentiable(self) -> bool:
        """True where autograd gives the gradient in the samples."""
        ...

    @property
    def learned(self) -> bool:
        """True where `build` gives a `LearnedReward`."""
        ...

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Load what the reward needs. Raises InputError if something cannot be loaded."""
        ...


if TYPE_CHECKING:
    NamedReward = RewardSettings
else:
    NamedReward = Annotated[Any, BeforeValidator(part_of("rewards"))]
"""The type of a setting that is a reward: its name, or a mapping with its name and settings."""


@runtime_checkable
class BoundReward(Protocol):
    """A reward that is bound to the samples of a batch: to the prompt or class of each."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def select(self, which: Which, /) -> Reward:
        """The reward of these samples of the batch."""
        ...


@runtime_checkable
class PromptedReward(Protocol):
    """A reward that depends on the prompts of the samples."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> Reward:
        """The reward of samples of these prompts, one for each."""
        ...


@runtime_checkable
class WithPrompts(Protocol):
    """A reward that is bound to prompts."""

    @property
    def prompts(self) -> Sequence[str]:
        """The prompts, one for each sample; none before it is bound."""
        ...


def select(reward: Reward, which: Which) -> Reward:
    """The reward of these samples of the batch; a reward that is not bound is the same for all."""
    return reward.select(which) if isinstance(reward, BoundReward) else reward


@runtime_checkable
class LearnedReward(Protocol):
    """A reward with a network that learns from samples."""

    network: nn.Module

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def learn(self, x: Tensor, generator: torch.Generator) -> float:
        """Learn from samples x [batch, *event] of the tuned model. Returns the loss before."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes: all that changes while it learns."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Resume from a state."""
        ...


@dataclass(frozen=True)
class OfPrompts:
    """A reward of pictures that depends on their prompts, metadata or labels.

    Args:
        score: score(images [batch, ..], **asked) -> [batch], `asked` being the arguments that it asks for.
        asks: which of these: `prompts`, a text for each picture; `metadata`, a mapping for each; `labels`, int64 [batch], the
            classes that a class-conditional model was asked for.
    """

    score: Callable[..., Tensor]
    asks: tuple[str, ...] = ("prompts",)
    prompts: tuple[str, ...] = ()
    metadata: tuple[Metadata, ...] = ()

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> OfPrompts:
        """The reward of pictures of these prompts, one for each."""
        return replace(self, prompts=tuple(prompts), metadata=tuple(metadata or ({} for _ in prompts)))

    def select(self, which: Which) -> OfPrompts:
        """The reward of these samples of the batch."""
        return self.given(chosen(self.prompts, which), chosen(self.metadata, which))

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.prompts) != len(x):
            raise InputError(
                f"the reward asks for {' and '.join(self.asks)}, and there are {len(self.prompts)} for {len(x)} samples"
                + ("" if self.prompts else ": this model has no prompts and no classes")
            )
        told: dict[str, Any] = {"prompts": self.prompts, "metadata": self.metadata}
        if "labels" in self.asks:
            if not all("label" in more for more in self.metadata):
                raise InputError(
                    "the reward asks for labels, which are those of a class-conditional model; this one has prompts"
                )
            told["labels"] = torch.tensor([more["label"] for more in self.metadata], device=x.device)
        return self.score(x, **{name: told[name] for name in self.asks})


@dataclass(frozen=True)
class InEvalMode:
    """A module called in eval mode: a reward is one function, without dropout and batch statistics."""

    module: nn.Module

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with eval_mode(self.module):
            return self.module(*arguments, **named)


def from_function(function: Callable[..., Any], name: str = "the reward") -> Reward:
    """A function of the user as a reward. Beside the images, its first argument, it may have arguments called `prompts`,
    `metadata` and `labels`: they are passed by name, so their order does not matter. It returns [batch] floats, or a pair of
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
    asks = tuple(p.name for p in parameters if p.name in ("prompts", "metadata", "labels"))
    others = [p for p in parameters if p.name not in asks]
    images = next((p for p in others if p.name == "images"), others[0] if others else None)
    needed = [p.name for p in others if p is not images and p.default is Parameter.empty]
    any_number = any(p.kind is Parameter.VAR_POSITIONAL for p in signature.parameters.values())
    if needed or (images is None and not any_number):
        got = ", ".join(signature.parameters) or "none"
        can = "the images, under any name, `prompts`, `metadata` and `labels`"
        raise InputError(f"{name} has the arguments ({got}); it can have {can}")
    if isinstance(function, nn.Module) and not isinstance(function, LearnedReward):
        function = InEvalMode(function)
    if not asks and (images is None or images is parameters[0]):
        return cast(Reward, function)

    def score(x: Tensor, **told: Any) -> Any:
        values = told if images is None else {images.name: x, **told}
        ordered = [values.pop(p.name) for p in parameters if p.kind is Parameter.POSITIONAL_ONLY and p.name in values]
        return function(*([x] if images is None else []), *ordered, **values)

    return OfPrompts(score, asks) if asks else score


class Statistics(Protocol):
    """Prompts and their metadata -> (mean, standard deviation) of the base's rewards, both [len(prompts)] in float64, computed
    when first asked for, and kept."""

    def __call__(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None, /) -> tuple[Tensor, Tensor]: ...

    def state_dict(self) -> dict[str, Any]:
        """The statistics computed so far, for `load_state_dict`."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Resume from a state."""
        ...


@dataclass(frozen=True)
class PerPrompt:
    """(r - mean) / std, with the mean and the standard deviation of the base's rewards for the prompt: every prompt is tilted
    equally, however far apart its pictures are. It is a fixed reward, unlike one that is standardised in its batch.

    The statistics are part of a checkpoint: a resumed run neither draws nor counts their samples again.
    """

    reward: Reward
    statistics: Statistics
    prompts: tuple[str, ...] = ()
    mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    std: Tensor = field(default_factory=lambda: torch.zeros(0))

    def state_dict(self) -> dict[str, Any]:
        """The statistics computed so far, for `load_state_dict`."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.statistics.load_state_dict(state)

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> PerPrompt:
        """The reward of samples of these prompts. Computes their statistics now, as all processes must do that together."""
        mean, std = self.statistics(prompts, metadata)
        return replace(self, reward=given(self.reward, prompts, metadata), prompts=tuple(prompts), mean=mean, std=std)

    def select(self, which: Which) -> PerPrompt:
        """The reward of these samples of the batch."""
        prompts = tuple(chosen(self.prompts, which))
        which = which.cpu() if isinstance(which, Tensor) else which
        return replace(self, reward=select(self.reward, which), prompts=prompts, mean=self.mean[which], std=self.std[which])

    def __call__(self, x: Tensor) -> Tensor:
        values = values_of(self.reward, x)
        return (values - self.mean.to(values)) / self.std.to(values)


def chosen(told: Sequence[Told], which: Which) -> Sequence[Told]:
    """Select the prompts, or their metadata, of these samples."""
    return told[which] if isinstance(which, slice) else [told[i] for i in which.tolist() if told]


def given(reward: Reward, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> Reward:
    """Bind a reward to the prompts of samples, one for each; a reward that does not ask for them is returned as it is."""
    return reward.given(prompts, metadata) if isinstance(reward, PromptedReward) else reward


def prompts_of(reward: Reward) -> Sequence[str]:
    """The prompts that a reward is bound to, if any."""
    return reward.prompts if isinstance(reward, WithPrompts) else ()


@dataclass(frozen=True)
class Shared:
    """A reward that all processes evaluate together, each on its share of the samples, without a gradient."""

    reward: Reward

    @property
    def prompts(self) -> Sequence[str]:
        """The prompts of all samples, where the reward is bound to them."""
        return prompts_of(self.reward)

    def __call__(self, x: Tensor) -> Tensor:
        parts = processes.shares(len(x))
        return processes.gathered([values_of(select(self.reward, part), x[part]) for part in parts], len(x))


def shared(reward: Reward) -> Reward:
    """`reward`, evaluated by all processes together: without a gradient where there are several."""
    return reward if processes.count() == 1 else Shared(reward)


def evaluate(reward: Reward, x: Tensor, non_finite: NonFiniteRewards = "error") -> Tensor:
    """Evaluate and check `reward(x)`: [batch].

    Args:
        non_finite: `drop` gives NaN where the reward is NaN or infinite, for the caller to leave out.

    Raises what `values_of` raises, and NonFiniteError, in all processes, for NaN or infinity in one.
    """
    value = values_of(reward, x)
    if non_finite == "drop":
        return torch.where(value.isfinite(), value, torch.nan)
    bad = (~torch.isfinite(value.detach())).nonzero()[:, 0]
    if processes.greatest(len(bad), x.device):
        raise NonFiniteError(
            f"the reward is not finite for {len(bad)} of {len(x)} samples",
            {
                "what": "reward",
                "samples": bad.tolist(),
                "prompts": [str(p) for p in chosen(prompts_of(reward), bad)],
            },
            {"rewards": value, "samples": x[bad[:8]]},
        )
    return value


def values_of(reward: Reward, x: Tensor) -> Tensor:
    """`reward(x)` [batch], of a copy of x through which gradients pass. NaN and infinity are not checked for.

    Raises InputError for a wrong shape or type, or if the reward hides from autograd that it changes its copy; UserCodeError if
    it raises an exception.
    """
    handed = x.clone()
    with explained("the reward"):
        value: Any = reward(handed)
    if isinstance(value, tuple) and len(value) == 2:
        value = value[0]  # (rewards, info), as in DDPO
    if not isinstance(value, Tensor):
        hint = "; torch.as_tensor(values) makes one" if isinstance(value, (list, np.ndarray)) else ""
        raise InputError(f"the reward must return a tensor, got {type(value).__name__}{hint}")
    if value.shape != x.shape[:1]:
        raise InputError(f"the reward must return one number per sample, shape [{len(x)}], got {list(value.shape)}")
    if not value.dtype.is_floating_point:
        raise InputError(f"the reward must return floats, got {str(value.dtype).removeprefix('torch.')}")
    # changes that autograd sees are counted in _version: the gradient is right, or torch refuses it
    if value.requires_grad and handed._version == 0 and not torch.allclose(handed, x, rtol=0, atol=0, equal_nan=True):
        raise InputError(
            "the reward changes its argument through .data or NumPy, which makes its gradient wrong; use a clone()"
        )
    return value.clone()


def try_reward(
    reward: Reward, x: Tensor, what: str = "the reward", *, gradient: bool = False, non_finite: NonFiniteRewards = "error"
) -> None:
    """Raises InputError, of one line, if the reward does not work for samples x [batch, *event] as a method will use it: for a
    wrong shape or type, an exception, a missing gradient with `gradient`, and numbers that are not finite unless dropped."""
    try:
        with torch.set_grad_enabled(gradient):
            (value_and_gradient if gradient else evaluate)(reward, x, non_finite)
    except NonFiniteError as error:
        raise InputError(str(error)) from error
    except UserCodeError as error:
        unfit = isinstance(error.__cause__, RuntimeError)  # torch raises it for a wrong shape
        fit = f"{what} does not take samples of shape {list(x.shape[1:])}: " if unfit else ""
        raise InputError(f"{fit}{error}") from error


@torch.no_grad()
def score(
    reward: Reward, x: Tensor, batch_size: int, device: torch.device | str, non_finite: NonFiniteRewards = "error"
) -> Tensor:
    """The values of a reward for samples x [n, *event], by all processes, a batch at a time: [n] on the CPU; with `drop`, NaN
    or infinite where one is.

    Args:
        reward: bound to these samples, or to none.

    Raises NonFiniteError, InputError and UserCodeError as `evaluate` does.
    """
    parts = processes.shares(len(x), batch_size)
    found = [evaluate(select(reward, part), x[part].to(device), non_finite) for part in parts]
    return processes.gathered(found, len(x)).cpu()


def finite_only(rewards: Tensor) -> Tensor | None:
    """Indices of the finite rewards among [batch]; None if all are finite. Raises NonFiniteError if fewer than two are."""
    finite = rewards.isfinite()
    if bool(finite.all()):
        return None
    kept = finite.nonzero()[:, 0]
    if len(kept) < FEWEST:
        where = {"what": "reward", "samples": (~finite).nonzero()[:, 0].tolist()}
        message = f"the reward is not finite for {len(rewards) - len(kept)} of {len(rewards)} samples: too few are left"
        raise NonFiniteError(message, where, {"rewards": rewards})
    return kept


def value_and_gradient(reward: Reward, x: Tensor, non_finite: NonFiniteRewards = "error") -> tuple[Tensor, Tensor]:
    """(r [batch], gradient of r with respect to x [batch, *event]), both detached and in float32 or better.

    Args:
        non_finite: `drop` gives NaN where the reward is NaN or infinite, and 0 for its gradient there.

    Raises InputError if the reward has no gradient, or overwrites in place what the gradient needs; NonFiniteError if it is not
    finite.
    """
    with torch.enable_grad():
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        value = evaluate(reward, x, non_finite)
        if not value.requires_grad:
            raise InputError("the reward has no gradient with respect to the sample, and this method needs one")
        finite = value.detach().isfinite()
        with explained("the gradient of the reward"):
            (gradient,) = torch.autograd.grad(value.sum() if finite.all() else value[finite].sum(), x)
        gradient = torch.where(expand(finite, x) > 0, gradient, 0)
    bad = (~torch.isfinite(gradient)).flatten(1).any(1).nonzero()[:, 0]
    if processes.greatest(len(bad), x.device):
        raise NonFiniteError(
            f"the gradient of the reward is not finite for {len(bad)} of {len(x)} samples",
            {"what": "gradient of the reward", "samples": bad.tolist()},
            {"gradient": gradient[bad[:8]], "samples": x[bad[:8]], "rewards": value},
        )
    return value.detach(), gradient
