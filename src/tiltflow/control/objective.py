r"""The objective of a control: the reward of a sample, and a running reward f(x, t) along the way to it.

With r the terminal reward, f a reward per unit of time and h_k = t_{k+1} - t_k, a chain maximises

    E[ sum_k h_k f(x_k, t_k) + r(x_K) ] - beta (path KL),      k = 0 .. K - 1.

In continuous time this is the control problem of arXiv 2409.08861, section 4, whose running cost is -f / beta here. Its optimum
is, for each x_0, the law of base paths tilted by exp((sum_k h_k f + r) / beta), as far as K Gaussian steps reach it; the law of
x_K is then in general not p_base(x) exp(r(x) / beta).
"""

# Mutation tests: test_objective.py

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.checked import evaluate, value_and_gradient
from tiltflow.user_code import explained


class RunningReward(Protocol):
    """(x [batch, *event], t []) -> [batch]: the reward per unit of time of states x at time t, from noise t = 0 to data t = 1.
    Higher is better. States are those of the sampler: latents where a model has a decoder. Differentiable in x."""

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Objective:
    """The rewards of a path.

    Args:
        terminal: of the sample at its end.
        running: of the states on the way; none by default.
    """

    terminal: Reward
    running: RunningReward | None = None

    def gains(self, states: Sequence[Tensor], times: Tensor) -> Tensor | None:
        """h_k f(x_k, t_k) of each of the K steps, [K, batch]; None without a running reward.

        Args:
            states: x_0 .. x_{K-1}, [batch, *event] each, and maybe more.
            times: [K + 1].

        Raises InputError, UserCodeError and NonFiniteError for values of f that are no rewards.
        """
        if self.running is None:
            return None
        steps = zip(states, times, times.diff(), strict=False)
        return torch.stack([h.item() * evaluate(self._at(t), x).detach() for x, t, h in steps])

    def gradient(self, x: Tensor, times: Tensor, k: int) -> Tensor:
        """The gradient of h_k f(x, t_k) in x [batch, *event], of an objective with a running reward f.

        Raises what `gains` raises, and InputError if f has no gradient.
        """
        return (times[k + 1] - times[k]).item() * value_and_gradient(self._at(times[k]), x)[1]

    def _at(self, t: Tensor) -> Reward:
        """f at time t. Raises InputError for what f returns, by its name."""

        def at_t(x: Tensor) -> Tensor:
            assert self.running is not None
            with explained("the running reward"):
                value = self.running(x, t.to(x))
            if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"the running reward must return one number per sample, shape [{len(x)}], got {got}")
            if x.requires_grad and not value.requires_grad:
                raise InputError("the running reward has no gradient with respect to x, and this method needs one")
            return value

        return at_t
