"""Rounds of a regression at samples that are noised afresh, with a perfect fit, among affine fields on the line."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tiny import iterate
from torch import Tensor, nn

from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import ExactVelocity, mixture
from tiltflow.streams import stream

CPU = torch.device("cpu")
BINS = 32
COUNT = 20_000
BASE = ExactVelocity(mixture(torch.zeros(1, 1, dtype=torch.float64), (1.0,), 1.0))
"""N(0, 1)."""


def bowl(x: Tensor) -> Tensor:
    return -x[:, 0].square() / 2


def slope(x: Tensor) -> Tensor:
    return x[:, 0]


class Affine(nn.Module):
    """The field of N(0, 1) and a + b x more, a and b of each of `BINS` parts of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.slope = (nn.Parameter(torch.zeros(BINS)) for _ in range(2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        part = (time * BINS).long().clamp(max=BINS - 1)
        return BASE(x, time) + self.offset[part, None] + self.slope[part, None] * x

    @property
    def law(self) -> tuple[float, float]:
        """Mean and variance at t = 1, by the ODE: exact, but for 4,000 steps of the offset."""
        a, b = (each.detach().double().numpy() for each in (self.offset, self.slope))
        t = (np.arange(4000) + 0.5) / 4000
        part, v = (t * BINS).astype(int), t**2 + (1 - t) ** 2
        # the field of N(0, 1) has the slope d log sqrt(v) / dt
        growth = np.cumsum(b[part]) / 4000 + np.log(v) / 2
        end = float(b.mean())
        return float((a[part] * np.exp(end - growth)).mean()), math.exp(2 * end)


def gradients_at(tuned: Affine, values: Tensor) -> Callable[[], Tensor]:
    """Put values [2, bins] into the parameters; what is returned takes the gradient [2, bins] away from them."""
    for parameter, value in zip((tuned.offset, tuned.slope), values, strict=True):
        parameter.data = value.clone()
        parameter.grad = None
    return lambda: torch.stack([p.grad for p in (tuned.offset, tuned.slope)])  # type: ignore[misc]


def fitted_round(method: Any, tuned: Affine, reward: Callable[[Tensor], Tensor], state: Any, seed: int = 0) -> dict[str, float]:
    """A round with a perfect fit: the gradient of the loss is affine in the parameters, and those of each part of the time have
    it to themselves; so three values of it, for the same noise, say where it vanishes."""
    generator = stream(seed, "round")
    levels = (torch.arange(COUNT) + 0.5).double() / COUNT
    x = torch.special.ndtri(levels).float()[:, None]
    method = method.model_copy(update={"num_passes": 3})
    steps = iterate(method, Flow(tuned), Flow(BASE), reward, x, generator, state, parameters=(tuned.offset, tuned.slope))
    start = torch.stack([tuned.offset.detach().clone(), tuned.slope.detach().clone()])
    before, found, measured = generator.get_state(), [], {}
    for away in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0]):
        generator.set_state(before)
        if not found:  # samples are drawn before the first gradient
            take = gradients_at(tuned, start)
            measured = next(steps)
        else:
            take = gradients_at(tuned, start + torch.tensor(away)[:, None])
            next(steps)
        found.append(take().double())
    jacobian = torch.stack([found[1] - found[0], found[2] - found[0]], 1)  # [equation, unknown, bins]
    move = torch.linalg.solve(jacobian.permute(2, 0, 1), -found[0].T[..., None])[..., 0].T
    gradients_at(tuned, start + move.float())
    assert next(steps, None) is None
    return measured


class Shifted(nn.Module):
    """The field of N(mean, 1)."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        t = time[:, None]
        out: Tensor = BASE(x, time) + self.mean * (1 - t) / (t**2 + (1 - t) ** 2)
        return out


def after(method: Any, reward: Callable[[Tensor], Tensor], rounds: int) -> tuple[float, float]:
    """Mean and variance of the law after so many rounds with a perfect fit."""
    tuned, state = Affine(), method.new_state((1,), 0, CPU)
    for i in range(rounds):
        fitted_round(method, tuned, reward, state, i)
    return tuned.law


def first_gradient(method: Any, reward: Callable[[Tensor], Tensor], *, anchor: float = 0.0) -> Tensor:
    tuned = Affine()
    tuned.slope.data += anchor
    state = method.new_state((1,), 0, CPU)
    state.batches = 1
    steps = iterate(
        method, Flow(tuned), Flow(BASE), reward, torch.randn(64, 1, generator=stream(0, "x")), stream(0), state,
        parameters=(tuned.offset, tuned.slope),
    )  # fmt: skip
    next(iter(steps))
    return torch.cat([p.grad for p in (tuned.offset, tuned.slope)])  # type: ignore[misc]
