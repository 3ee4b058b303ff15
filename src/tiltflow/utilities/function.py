r"""A utility of your own: any function of samples and their rewards, with autograd's first variation.

Of the empirical law of points x_1, .., x_n with weights w, F(sum_i w_i delta_i), the first variation is

    dF(x) = dF / dw at the weight 0 of one more point x          if the function takes `weights`: exact at this law;
    dF(x) = (n + 1) (F(x_1, .., x_n, x) - F(x_1, .., x_n))       if it does not: up to order 1 / n.

The derivative of both in x is that of dF; at a sample x_i of weight 1 / n it is n dF / dx_i, and not the dF / dx_i that
autograd has of the mean of n samples. Scores are told as a function of x that stays
as it is: that they change with the law is in no derivative of the function, so E |s|^2 has a wrong first variation.
"""

# Mutation tests: test_utility_function.py

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter
from typing import Any, Literal

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.flows.field import Which
from tiltflow.plugins import import_function
from tiltflow.rewards import Metadata, Reward, select
from tiltflow.rewards.functions.checked import values_of
from tiltflow.rewards.functions.prompted import given
from tiltflow.settings import FunctionOrName
from tiltflow.streams import stream
from tiltflow.user_code import explained
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_samples
from tiltflow.utilities.estimation.known import Known, Need, OfSamples

ASKS = ("weights", "rewards", "scores")
GROUPS = 20
"""Of samples that are left out in turn for the error of a function without weights."""


class Function(Utility):
    """Your function gets samples x [n, *event] and returns one number, higher is better. By name it may ask for `weights` [n],
    float64, which sum to 1 but for those of points that are added with the weight 0; `rewards` [n]; `scores` [n, *event]. It
    must be differentiable, with `weights` twice, and depend on the samples as a set."""

    name: Literal["function"] = "function"
    path: FunctionOrName
    """`package.module:function`, from the Python path or the current directory."""

    @property
    def words(self) -> str:
        return f"a high value of {self.path}"

    @property
    def reward_names(self) -> tuple[str, ...]:
        return ("reward",) if "rewards" in self._of().asks else ()

    @property
    def needs(self) -> tuple[Need, ...]:
        return ("score",) if "scores" in self._of().asks else ()

    @property
    def concave(self) -> bool:
        return False  # as far as anybody knows

    def caveats(self, alpha: float) -> tuple[str, ...]:
        if "scores" not in self._of().asks:
            return super().caveats(alpha)
        fixed = f"{self.path} takes scores, whose own change with the law is not in its first variation"
        return (*super().caveats(alpha), fixed)

    def _of(self) -> OfLaw:
        return of_law(import_function(self.path, "utility"), f"utility {self.path}")

    def _value(self, at: Known) -> Estimate:
        return self._of().value(at)

    def _first_variation(self, at: Known) -> FirstVariation:
        return self._of().first_variation(at)


@dataclass(frozen=True)
class OfLaw:
    """A function of the samples of a law, what it asks for beside them, and its name in errors."""

    function: Callable[..., Tensor]
    asks: tuple[str, ...]
    name: str

    def __call__(self, x: Tensor, told: Mapping[str, Tensor]) -> Tensor:
        with explained(self.name):
            value: Any = self.function(x.clone(), **{name: told[name].clone() for name in self.asks})  # it may write into them
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.dtype.is_floating_point:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{self.name} must return one number, a float tensor [], got {got}")
        return value.reshape(())

    def told(self, at: Known) -> dict[str, Tensor]:
        """What it may ask for at the samples of a law."""
        if "weights" not in self.asks and at.weights is not None and not torch.allclose(at.p, at.p[0]):
            raise InputError(f"{self.name} has no argument `weights`, and the samples have some: add it")
        told = {"weights": at.p}
        if "rewards" in self.asks:
            told["rewards"] = at.values("reward").to(at.x.dtype)
        if "scores" in self.asks and at.score is not None:
            told["scores"] = at.score(at.x)
        return told

    def value(self, at: Known) -> Estimate:
        """With the error of the delta method for a function with weights, of a jackknife over groups of samples for others."""
        told = self.told(at)
        if "weights" in self.asks:
            with torch.enable_grad():
                told["weights"] = at.p.clone().requires_grad_()
                value = self(at.x, told)
                return at.estimate(value.detach(), self.slope(value, told["weights"]))
        with torch.no_grad():
            whole = float(self(at.x, told))
            order = torch.randperm(len(at.x), generator=stream(at.seed, "groups")).to(at.x.device)
            groups = order.tensor_split(min(GROUPS, len(at.x)))
            kept = [torch.cat([*groups[:i], *groups[i + 1 :]]) for i in range(len(groups))]
            left = [self(at.x[which], {name: each[which] for name, each in told.items()}) for which in kept]
            error = ((len(groups) - 1) * torch.stack(left).double().var(correction=0)) ** 0.5
            return Estimate(whole, float(error))

    def slope(self, value: Tensor, weights: Tensor, *, create_graph: bool = False) -> Tensor:
        """The derivative of its value in the weights."""
        slope: Tensor | None = None
        with explained(f"the gradient of {self.name}"):
            if value.requires_grad:
                (slope,) = torch.autograd.grad(value, weights, create_graph=create_graph, allow_unused=True)
        if slope is None:
            raise InputError(f"{self.name} does not use its `weights`: leave the argument out, or take means with them")
        return slope

    def first_variation(self, at: Known) -> FirstVariation:
        """At the law of these samples."""
        return of_samples(Slope(self, at.x.detach(), self.told(at), at.reward.get("reward"), at.score))


@dataclass(frozen=True)
class Slope:
    """The first variation of a function of the samples of a law at those samples, and what was told of them.

    Args:
        reward, score: what is told of other points, where the function asks for it.
    """

    function: OfLaw
    samples: Tensor
    told: Mapping[str, Tensor]
    reward: Reward | None
    score: OfSamples | None

    def __call__(self, x: Tensor) -> Tensor:
        own: dict[str, Tensor] = {"weights": self.told["weights"].new_zeros(len(x))}
        if self.reward is not None and "rewards" in self.told:
            own["rewards"] = values_of(self.reward, x)
        if self.score is not None and "scores" in self.told:
            own["scores"] = self.score(x)
        if "weights" not in self.function.asks:
            before = self.function(self.samples, self.told)
            after = [self._with(x[i : i + 1], {name: each[i : i + 1] for name, each in own.items()}) for i in range(len(x))]
            return (len(self.samples) + 1) * (torch.stack(after) - before)
        further = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            own["weights"].requires_grad_()
            value = self._with(x, own)
            return self.function.slope(value, own["weights"], create_graph=further).to(x.dtype)

    def _with(self, x: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """The value with points x, and what is told of them, beside the samples."""
        return self.function(torch.cat([self.samples, x]), {name: torch.cat([self.told[name], own[name]]) for name in own})

    def given(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> Slope:
        return replace(self, reward=None if self.reward is None else given(self.reward, prompts, metadata))

    def select(self, which: Which) -> Slope:
        return replace(self, reward=None if self.reward is None else select(self.reward, which))


def of_law(function: Callable[..., Tensor], name: str = "the utility") -> OfLaw:
    """A function of the user as one of a law. Raises InputError, naming it, if it needs an argument that it cannot get."""
    if not callable(function):
        raise InputError(f"{name} must be a function of samples [n, ..] -> [], is {type(function).__name__}")
    _, *others = inspect.signature(function).parameters.values()
    needed = [each.name for each in others if each.default is Parameter.empty and each.name not in ASKS]
    if needed:
        raise InputError(f"{name} has the argument {needed[0]!r}; beside the samples it can have {', '.join(ASKS)}")
    return OfLaw(function, tuple(each.name for each in others if each.name in ASKS), name)
