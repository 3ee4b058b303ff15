"""The law that a method aims at: the base, tilted by the reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate
from tiltflow.flows.field import VelocityField
from tiltflow.laws.law import Array, Law
from tiltflow.samplers.grid import Start

RewardAt = Callable[[Array], Array]
"""A reward of points on the line: [n] -> [n]."""
Reach = Literal["exact", "first-order", "none"]
"""How near to p_base(x) exp(r(x) / beta), at some beta, the law of a perfectly trained run is."""
TILTED = "p_base(x) exp(r(x) / beta)"
"""The law that most methods aim at, in words."""
NEARLY_ZERO = 1e-12
"""The temperature of a maximum, in units of reward: finite, so that the best sample of each group is told from the others."""


class MeasureBalance(Protocol):
    """Estimate the pull of the reward over the penalty from samples of the tuned model."""

    def __call__(
        self,
        tuned: VelocityField,
        base: VelocityField,
        x1: Tensor,
        rewards: Tensor,
        generator: torch.Generator,
        /,
        *,
        start: Start = 0.0,
        batch_size: int | None = None,
    ) -> Estimate | None:
        """The estimate, of samples x1 [batch, *event] of `tuned` and their rewards [batch]; None where nothing was learned."""
        ...


@dataclass(frozen=True)
class Balance:
    """How far training is from the law at which it settles: there the pull of the reward over the penalty is 1.

    Args:
        measure: estimates that ratio.
        expected: the ratio after the steps of the run, to first order.
    """

    measure: MeasureBalance
    expected: float


@dataclass(frozen=True)
class Target:
    """The law that a method aims at, of so many optimizer steps.

    Args:
        log_tilt: rewards [batch] -> log of the law's density over p_base, up to a constant, float64 [batch].
        words: the law, in words.
        caveats: reasons why the law that is reached is not p_base exp(r / beta), one sentence each.
        beta: the temperature that the method works at, in units of reward; None for a method without one.
        temperature: beta of the law p_base exp(r / beta), where that is what is aimed at; None where it is another.
        exact: the law on the line, of the law of the base and the reward; None where it is the base tilted by `log_tilt`.
            Raises ValueError where the law is not known.
        balance: of a method that settles where the pull of the reward is in balance with a penalty.
        reaches: how near to p_base exp(r / beta), at some beta, a perfectly trained run comes. exact: it is that law, up to the
            errors of sampler, fit and finite steps. first-order: only to first order in 1 / beta. none: not even that.
        maximises: whether the method raises the mean reward and stops at no law: samples have none to be compared with.
    """

    log_tilt: Callable[[Tensor], Tensor]
    words: str
    caveats: tuple[str, ...] = ()
    beta: float | None = None
    temperature: float | None = None
    exact: Callable[[Law, RewardAt], Law] | None = None
    balance: Balance | None = None
    reaches: Reach = "exact"
    maximises: bool = False

    def tilted(self, base: Law, reward: RewardAt) -> Law:
        """The law on the line whose density over that of `base` is exp(log_tilt)."""
        return base.tilt(self.log_tilt(torch.from_numpy(reward(base.points))).numpy())

    def law(self, base: Law, reward: RewardAt) -> Law:
        """The target on the line. Raises ValueError if it is not known."""
        return self.tilted(base, reward) if self.exact is None else self.exact(base, reward)


def maximum(words: str, caveats: Sequence[str] = ()) -> Target:
    """No law: a method that raises `words` for as long as it trains, whose tilt is the limit of exp(r / beta) at beta = 0."""

    def unknown(base: Law, reward: RewardAt) -> Law:
        raise ValueError(f"a method that maximises {words} has no law at which it settles")

    nothing = (
        "Nothing holds the model near the base but the end of training: the mean reward is raised until then, and there is"
    )
    return Target(
        log_tilt=lambda rewards: rewards.double() / NEARLY_ZERO,
        words=f"the largest {words}",
        caveats=(f"{nothing} no law at which this settles.", *caveats),
        exact=unknown,
        reaches="none",
        maximises=True,
    )


def exponential_tilt(beta: float, caveats: Sequence[str] = (), reaches: Reach = "exact") -> Target:
    """p_base(x) exp(r(x) / beta), at temperature beta in units of reward.

    >>> exponential_tilt(0.25).log_tilt(torch.tensor([1.0, -0.5])).tolist()
    [4.0, -2.0]
    """
    return Target(
        log_tilt=lambda rewards: rewards.double() / beta,
        words=TILTED,
        caveats=tuple(caveats),
        beta=beta,
        temperature=beta,
        reaches=reaches,
    )
