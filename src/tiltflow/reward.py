"""Rewards: functions of a sample, higher is better.

A reward takes x [batch, *event] and returns [batch]: finite, one number per sample, no sample looking at its neighbours.
Methods that need a gradient say so, and get it from autograd. A plain function is a reward. A reward may learn while a method
trains: from the samples that it is shown after each iteration. A reward of a text-to-image model may be told the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tiltflow import processes
from tiltflow.errors import InputError, NonFiniteError
from tiltflow.flow import rows


class Reward(Protocol):
    """x [batch, *event] -> [batch]."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


@runtime_checkable
class LearnedReward(Protocol):
    """A reward with a network that learns from samples."""

    network: nn.Module

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def learn(self, x: Tensor, generator: torch.Generator) -> float:
        """Learn from samples x [batch, *event] of the tuned model; returns the loss before."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that changes while it learns; what `load_state_dict` takes."""
        ...

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go on from there."""
        ...


@dataclass(frozen=True)
class OfPrompts:
    """A reward of a picture and the prompt that it was made for: score(images [batch, ..], prompts) -> [batch]."""

    score: Callable[[Tensor, Sequence[str]], Tensor]
    prompts: tuple[str, ...] = ()

    def given(self, prompts: Sequence[str]) -> OfPrompts:
        """The reward of pictures of these prompts, one for each."""
        return replace(self, prompts=tuple(prompts))

    def rows(self, which: Tensor | slice) -> OfPrompts:
        """The same for those samples of the batch."""
        return self.given(chosen(self.prompts, which))

    def __call__(self, x: Tensor) -> Tensor:
        if len(self.prompts) != len(x):
            raise InputError(f"the reward is of pictures and their prompts, and has {len(self.prompts)} prompts for {len(x)}")
        return self.score(x, self.prompts)


@dataclass(frozen=True)
class PerPrompt:
    """(r - mean) / std, with the mean and the standard deviation of the base's rewards for the prompt: every prompt is tilted
    as hard as any other, however far apart its pictures are. A fixed reward, unlike one that is standardised in its batch.

    Args:
        statistics: prompts -> (mean, std), both [len(prompts)].
    """

    reward: Reward
    statistics: Callable[[Sequence[str]], tuple[Tensor, Tensor]]
    prompts: tuple[str, ...] = ()
    mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    std: Tensor = field(default_factory=lambda: torch.zeros(0))

    def given(self, prompts: Sequence[str]) -> PerPrompt:
        """The reward of samples of these prompts, whose statistics are asked for now: by all processes together."""
        mean, std = self.statistics(prompts)
        return replace(self, reward=given(self.reward, prompts), prompts=tuple(prompts), mean=mean, std=std)

    def rows(self, which: Tensor | slice) -> PerPrompt:
        """The same for those samples of the batch."""
        prompts = tuple(chosen(self.prompts, which))
        which = which.cpu() if isinstance(which, Tensor) else which
        return replace(self, reward=rows(self.reward, which), prompts=prompts, mean=self.mean[which], std=self.std[which])

    def __call__(self, x: Tensor) -> Tensor:
        values = evaluate(self.reward, x)
        return (values - self.mean.to(values)) / self.std.to(values)


def chosen(prompts: Sequence[str], which: Tensor | slice) -> Sequence[str]:
    """Those of the prompts, one for each sample."""
    return prompts[which] if isinstance(which, slice) else [prompts[i] for i in which.tolist() if prompts]


def given(reward: Reward, prompts: Sequence[str]) -> Reward:
    """The reward of samples of these prompts, one for each; one that does not ask for prompts is the same for all."""
    told: Reward = reward.given(prompts) if hasattr(reward, "given") else reward
    return told


@dataclass(frozen=True)
class Shared:
    """A reward that all processes evaluate together, each on its share of the samples; without a gradient."""

    reward: Reward

    @property
    def prompts(self) -> Sequence[str]:
        """Of all samples, if the reward was told them."""
        return getattr(self.reward, "prompts", ())

    def __call__(self, x: Tensor) -> Tensor:
        parts = processes.shares(len(x))
        return processes.gathered([_values(rows(self.reward, part), x[part]) for part in parts], len(x))


def shared(reward: Reward) -> Reward:
    """`reward`, evaluated by all processes together; without a gradient if they are several."""
    return reward if processes.count() == 1 else Shared(reward)


def evaluate(reward: Reward, x: Tensor) -> Tensor:
    """`reward(x)`, checked. Raises InputError for a wrong shape or type, NonFiniteError, in all processes, for NaN or infinity
    in one."""
    value = _values(reward, x)
    bad = (~torch.isfinite(value.detach())).nonzero()[:, 0]
    if processes.greatest(len(bad), x.device):
        raise NonFiniteError(
            f"the reward is not finite for {len(bad)} of {len(x)} samples",
            {
                "what": "reward",
                "samples": bad.tolist(),
                "prompts": [str(p) for p in chosen(getattr(reward, "prompts", ()), bad)],
            },
            {"rewards": value, "samples": x[bad[:8]]},
        )
    return value


def _values(reward: Reward, x: Tensor) -> Tensor:
    """`reward(x)` [batch]. Raises InputError for a wrong shape or type."""
    value = reward(x)
    if not isinstance(value, Tensor):
        raise InputError(f"the reward must return a tensor, got {type(value).__name__}")
    if value.shape != x.shape[:1]:
        raise InputError(f"the reward must return one number per sample, shape [{len(x)}], got {list(value.shape)}")
    if not value.dtype.is_floating_point:
        raise InputError(f"the reward must return floats, got {str(value.dtype).removeprefix('torch.')}")
    return value


def value_and_gradient(reward: Reward, x: Tensor) -> tuple[Tensor, Tensor]:
    """(r [batch], gradient of r with respect to x [batch, *event]), both detached and in float32 or better.

    Raises InputError if the reward has no gradient, NonFiniteError if it is not finite.
    """
    with torch.enable_grad():
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_()
        value = evaluate(reward, x)
        if not value.requires_grad:
            raise InputError("the reward has no gradient with respect to the sample, and this method needs one")
        (gradient,) = torch.autograd.grad(value.sum(), x)
    bad = (~torch.isfinite(gradient)).flatten(1).any(1).nonzero()[:, 0]
    if processes.greatest(len(bad), x.device):
        raise NonFiniteError(
            f"the gradient of the reward is not finite for {len(bad)} of {len(x)} samples",
            {"what": "gradient of the reward", "samples": bad.tolist()},
            {"gradient": gradient[bad[:8]], "samples": x[bad[:8]], "rewards": value},
        )
    return value.detach(), gradient
