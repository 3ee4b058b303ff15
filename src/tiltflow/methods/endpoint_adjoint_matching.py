r"""Endpoint Adjoint Matching: adjoints in closed form, at ends drawn by an ODE (Efficient Adjoint Matching, arXiv 2605.11480).

Adjoint Matching controls the memoryless process of the base. Here it controls that of a Gaussian N(m, S), which is linear, and
the difference between the two is part of the reward: r / beta + log p_base - log N(m, S). The lean adjoint of a linear process
is its end's gradient times a number, so no path has to be kept: the ends come from an ODE in few steps, and are noised afresh,

    target = v_N(x_t, t) + (1 - t) S / (t^2 S + (1 - t)^2) E[ grad r(x_1) / beta + s_base(x_1) + (x_1 - m) / S | x_t ],
    v_N = m + (t S - (1 - t)) / (t^2 S + (1 - t)^2) (x - t m).

The score of the base at x_1 is read from its field just before the end: at a time t_1 the field at t_1 x_1 knows that of x_1
with noise of standard deviation (1 - t_1) / t_1. One round is

    1.  draw samples by the ODE, without gradients
    2.  take the gradients of the reward and the scores of the base at them: one evaluation each
    3.  regress, with fresh noise and times.

The law is the tilt of the base with that noise, off by (1 - t_1)^2, whatever m and S; those of the base, measured on its own
samples, make the rounds settle. **It does not see the weights of modes:** a score says where to go within a mode, and not how
much of the law is in it. A round takes the log odds of modes six standard deviations apart 4 % of their way, and those of modes
eight apart nowhere (`tiltflow.laws.adjoint_laws`); Adjoint Matching moves them through the Jacobian of the base's field.
"""

# Mutation tests: test_endpoint_adjoint_matching.py

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.flows.interpolant import expand
from tiltflow.laws.adjoint_laws import smoothed_tilt
from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.methods import Positive
from tiltflow.methods.regressions.drawn_samples import Count, DrawnSamples
from tiltflow.rewards.functions.checked import finite_only, value_and_gradient
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import sample
from tiltflow.training.batch import Batch
from tiltflow.training.method import Needs
from tiltflow.training.noising import noising, posterior, shuffled


@dataclass
class State:
    """The Gaussian whose process is controlled: its mean [*event] and the variance of each coordinate, of the base's samples in
    the first batch."""

    device: torch.device
    mean: Tensor | None = None
    variance: float = 1.0

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity of the Gaussian at x [batch, *event] and t [batch, 1, ..]."""
        assert self.mean is not None, "the Gaussian is measured on the first batch"
        total = t**2 * self.variance + (1 - t) ** 2
        return self.mean + (t * self.variance - (1 - t)) / total * (x - t * self.mean)

    def propagated(self, force: Tensor, t: Tensor) -> Tensor:
        """What a force [batch, *event] at the end of a path adds to the velocity at t [batch, 1, ..]."""
        return (1 - t) * self.variance / (t**2 * self.variance + (1 - t) ** 2) * force

    def state_dict(self) -> dict[str, Any]:
        """The state that `load_state_dict` takes."""
        return {"mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.mean, self.variance = state["mean"], state["variance"]
        self.mean = None if self.mean is None else self.mean.to(self.device)


class EndpointAdjointMatching(DrawnSamples):
    """Endpoint Adjoint Matching. Needs a differentiable reward, and no paths. Within a mode it aims at
    p_base(x) exp(r(x) / beta); the weights of separate modes stay about as they are."""

    name: Literal["endpoint-adjoint-matching"] = "endpoint-adjoint-matching"
    beta: Positive = 1.0
    """Temperature of the tilt, in units of reward: small follows the reward, large stays with the base."""
    score_time: Annotated[float, Field(gt=0, lt=1)] = 0.98
    """Time at which the base's field gives the scores of samples. The law is that of a base with noise of standard deviation
    (1 - score_time) / score_time; nearer to 1 the field's own errors count for more."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 8
    """Steps of the solver, from noise to data."""
    num_passes: Count = 4
    """Optimizer steps on each batch of samples, each with fresh noise and times."""

    def learns_nothing(self, group: int) -> str | None:
        """See `MethodSettings`: a single sample has a gradient."""
        return None

    @property
    def needs(self) -> Needs:
        """The gradient of the reward."""
        return Needs(reward_gradient=True, passes=self.num_passes)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """The tilt of the base with the noise of its scores, if it is of one piece."""
        noise = (1 - self.score_time) / self.score_time
        caveats = [
            "Scores do not see the weights of modes: those of modes that are apart stay about as they are in the base, and only"
            " what is within a mode is tilted.",
            f"The law that is tilted is the base's with noise of standard deviation {noise:.2g} in each coordinate.",
        ]
        return replace(
            exponential_tilt(self.beta, caveats, reaches="none"),
            exact=lambda base, reward: smoothed_tilt(base, reward, self.beta, self.score_time, rescaled=True),
        )

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> State:
        """The state that is kept between iterations."""
        return State(device)

    def gradients(self, batch: Batch, state: State) -> Iterator[dict[str, float]]:
        """One round: yields once for each of `num_passes` optimizer steps, its gradient accumulated.

        Args:
            state: kept between rounds; changed in place.
        """
        if state.mean is None:
            of_base = sample(batch.whole(batch.base), batch.x, self.sampling, batch.generator, start=batch.start)
            state.mean = of_base.mean(0)
            state.variance = (of_base - state.mean).square().mean().item()
        acting = batch.actor or batch.tuned
        acting = batch.whole(batch.guide(acting) if batch.guide else acting)
        x1 = sample(acting, batch.x, self.sampling, batch.generator, start=batch.start)
        forces, rewards = batch.map(lambda some, part: self._forces(some, x1[part]), dims=(0, 0))
        measured = {}
        if (kept := finite_only(rewards)) is not None:
            measured = {"dropped": float(len(x1) - len(kept))}
            batch, x1, forces, rewards = batch.select(kept), x1[kept], forces[kept], rewards[kept]
        forces = forces + (x1 - state.mean) / state.variance
        measured |= {"reward": rewards.mean().item(), "reward_std": rewards.std(correction=0).item()}
        for _ in range(self.num_passes):
            yield {**measured, **self._regress(batch, x1, forces, state)}

    def _forces(self, batch: Batch, x1: Tensor) -> tuple[Tensor, Tensor]:
        """grad r / beta plus the base's score at samples x1, both [batch, *event], and their rewards [batch]."""
        rewards, gradient = value_and_gradient(batch.reward, x1, batch.non_finite)
        t = self.score_time
        with torch.no_grad():
            velocity = batch.base(t * x1, torch.tensor(t, dtype=torch.float64, device=x1.device))
        # t times the score of t x_1 + (1 - t) x_0 at t x_1, where that is (t v - x) / (1 - t)
        return gradient / self.beta + t**2 / (1 - t) * (velocity - x1), rewards

    def _regress(self, batch: Batch, x1: Tensor, forces: Tensor, state: State) -> dict[str, float]:
        """Accumulate the gradient of the misfit to the target at the samples x1 with fresh noise."""
        which = shuffled(len(x1), len(x1), batch.generator)
        pairs = noising(batch.tuned, x1, which, self.sampling, batch.generator, start=batch.start)
        groups = batch.tuned.groups(len(x1), x1.device)

        def terms_of(part: slice) -> dict[str, Tensor]:
            points = pairs.points(part)
            t, x = expand(points.t, points.x), points.x
            pull = (posterior(points, x1, groups).to(forces) @ forces.flatten(1)).reshape(x.shape)
            target = state.velocity(x, t) + state.propagated(pull, t)
            misfit = batch.tuned.select(points.which)(x, points.t) - target
            # in the network's own prediction, in which pretraining weighed errors
            scale = batch.tuned.prediction_scale(points.t).to(x) ** 2 / x[0].numel()
            return {"loss": scale * misfit.flatten(1).square().sum(1)}

        return batch.accumulate(terms_of, len(which), over=len(which))
