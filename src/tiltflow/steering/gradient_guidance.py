"""Gradient guidance: the reward's gradient at the sample that the model predicts, added to the velocity (2209.14687)."""

# Mutation tests: test_steering.py

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.flows.field import Wrapper
from tiltflow.flows.interpolant import expand
from tiltflow.laws.other_laws import guided
from tiltflow.rewards.functions.checked import value_and_gradient
from tiltflow.samplers.rollout import sample
from tiltflow.settings import Settings
from tiltflow.steering import Chosen, SteeredLaw
from tiltflow.steering.drawing.source import Source


class GradientGuidance(Settings):
    """The gradient of r / beta at the predicted sample as guidance: the cheapest push toward a reward, and no tilt."""

    name: Literal["gradient-guidance"] = "gradient-guidance"
    beta: Annotated[float, Field(gt=0)] = 1.0
    """Temperature, in units of reward: the strength is 1 / beta."""
    curvature: Annotated[float, Field(ge=0)] = 0.0
    """Damping: how fast the gradient of the reward falls, the q of a reward -q |x|^2 / 2. The guidance is divided by
    1 + q w / beta, w the posterior variance of a Gaussian of this `std`; 0 is no damping."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of the base, for the damping."""
    max_ratio: Annotated[float, Field(gt=0)] | None = None
    """The guidance of a sample is at most so many times as long as its velocity."""

    def law(self, num_samples: int) -> SteeredLaw:
        """That of the ODE with this guidance: one explicit step toward the tilt on a Gaussian, exact there with damping."""
        words = "of a guided ODE or SDE: not p_base(x) exp(r(x) / beta), and with the modes of the base in wrong shares"
        if self.max_ratio is not None:
            return SteeredLaw(words)
        std = self.std if self.curvature else 0.0
        return SteeredLaw(words, exact=lambda base, reward: guided(base, reward, self.beta, curvature=self.curvature, std=std))

    def check(self, source: Source) -> None:
        """Raise InputError, from a first state, for a reward without a gradient, and for a scheduler's own steps."""
        if source.sampling.scheduler is not None:
            raise InputError(f"scheduler {source.sampling.scheduler}: takes no guidance by a reward; name a solver")
        with eval_mode(source.model.flow.network):
            x = source.noise(1, source.generator("try", device=source.model.device))
            value_and_gradient(source.of_states(1), x)

    def draw(self, source: Source, num_samples: int) -> Chosen:
        """Draw independent samples by the sampler with guidance."""
        parts = []
        with eval_mode(source.model.flow.network):
            for i, begin in enumerate(range(0, num_samples, source.batch_size)):
                count = min(source.batch_size, num_samples - begin)
                generator = source.generator("noise", i, device=source.model.device)
                x = source.noise(count, generator)
                field = pushed(source, self, count)
                parts.append(sample(field, x, source.sampling, generator, start=source.model.grid))
            x = torch.cat(parts)
            rewards = source.scored(x)
        return Chosen(source.decoded(x).cpu(), rewards, num_samples, float(num_samples))

    def temperature(self, t: Tensor) -> Tensor:
        """beta with its damping at times t: beta + q w_t."""
        w = (self.std * (1 - t)) ** 2 / ((self.std * t) ** 2 + (1 - t) ** 2)
        return self.beta + self.curvature * w


@dataclass(frozen=True)
class Pushed(Wrapper):
    """A field v with the guidance (1 - t) / t grad r(x + (1 - t) v) / temperature, the gradient of a log density as a velocity.

    Args:
        source: whose rewards these are.
        count: how many samples they are of.
        first: the earliest time at which the guidance is computed, above 0: at 0 it is a limit.
    """

    source: Source
    settings: GradientGuidance
    count: int
    first: float

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        s = t.clamp(min=self.first)
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            v = self.flow(at, s)
            predicted = at + expand(1 - s, x) * v
        self.source.reward_evaluations += self.count
        _, slope = value_and_gradient(self.source.of_states(self.count), predicted)
        (gradient,) = torch.autograd.grad(predicted, at, slope.to(predicted))
        push = expand((1 - s) / s / self.settings.temperature(s), x) * gradient
        v = v.detach() if torch.equal(s, t) else self.flow(x, t)
        return v + self._shortened(push, v)

    def _shortened(self, push: Tensor, v: Tensor) -> Tensor:
        """The guidance, at most `max_ratio` times as long as the velocity of its sample."""
        if self.settings.max_ratio is None:
            return push
        longest = self.settings.max_ratio * v.flatten(1).norm(dim=1)
        return push * expand((longest / push.flatten(1).norm(dim=1).clamp(min=1e-30)).clamp(max=1), x=push)


def pushed(source: Source, settings: GradientGuidance, count: int) -> Pushed:
    """The field of so many samples with guidance, computed from half the first step on."""
    times = source.sampling.times(source.model.grid)
    return Pushed(source.field(count), source, settings, count, (times[0] + times[1]).item() / 2)
