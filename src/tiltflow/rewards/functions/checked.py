"""Calls of a reward: on copies, by all processes, with checks of what it returns and of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiltflow import processes
from tiltflow.errors import InputError, NonFiniteError, UserCodeError
from tiltflow.flows.interpolant import expand
from tiltflow.offload import scoring
from tiltflow.rewards import NonFiniteRewards, Reward, select
from tiltflow.rewards.functions.counting import count_rewards
from tiltflow.rewards.functions.prompted import chosen, prompts_of
from tiltflow.timing import phase
from tiltflow.user_code import explained

FEWEST = 2
"""The fewest samples that may be left where others are left out."""


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


@dataclass(frozen=True)
class Answered:
    """A reward whose values [batch] are known."""

    values: Tensor
    prompts: Sequence[str] = ()

    def __call__(self, x: Tensor) -> Tensor:
        return self.values


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


@phase("reward")
@scoring()
def values_of(reward: Reward, x: Tensor) -> Tensor:
    """`reward(x)` [batch], of a copy of x through which gradients pass. NaN and infinity are not checked for.

    Raises InputError for a wrong shape or type, or if the reward hides from autograd that it changes its copy; UserCodeError if
    it raises an exception.
    """
    handed = x.clone()
    if not isinstance(reward, Answered | Shared):  # known, and counted where it is evaluated
        count_rewards(len(x))
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
@scoring()
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


@phase("reward")
@scoring()
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
