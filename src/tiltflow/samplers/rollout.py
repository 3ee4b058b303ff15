"""Samples, and the trajectories that lead to them."""

# Mutation tests: test_sampler.py

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.flows.field import Velocity, VelocityField
from tiltflow.flows.interpolant import expand
from tiltflow.samplers.chain import Chain, step
from tiltflow.samplers.grid import Start
from tiltflow.samplers.sampling import Sampling
from tiltflow.samplers.solver import OdeFunction, OdeSolver, StochasticSolver
from tiltflow.samplers.solvers.euler import euler
from tiltflow.samplers.stored import AS_COMPUTED, Storage, Stored
from tiltflow.streams import Noise, normal
from tiltflow.timing import phase
from tiltflow.user_code import explained


@dataclass(frozen=True)
class Trajectory:
    """One simulated batch: the states x_0, x_1, .. and the velocities of the flow there, all [batch, *event].

    Args:
        acting: the velocities that took the steps, where they differ from the flow's: guided ones.
    """

    chain: Chain
    states: Stored
    velocities: Stored
    acting: Stored | None = None

    def moved(self, move: Callable[[Stored], Stored]) -> Trajectory:
        """These trajectories, each part of them moved."""
        acting = None if self.acting is None else move(self.acting)
        return Trajectory(self.chain, move(self.states), move(self.velocities), acting)

    def keep(self, kept: Tensor) -> Trajectory:
        """The trajectories of these samples, in the memory of all; see `Stored.keep`."""
        return self.moved(lambda values: values.keep(kept))

    @property
    def drawn_by(self) -> Stored:
        """The velocities that took the steps."""
        return self.velocities if self.acting is None else self.acting

    def noise(self, k: int) -> Tensor:
        """eps_k, the noise of step k, [batch, *event]."""
        mean = self.chain.mean(k, self.states[k], self.drawn_by[k])
        return (self.states[k + 1] - mean) / self.chain.std[k].item()

    def noise_at(self, k: Tensor, i: Tensor) -> Tensor:
        """The noise of the steps k [pairs] of the samples i [pairs]: [pairs, *event]."""
        x = self.states.at(k, i)
        x_scale, v_scale, std = (expand(c.to(x)[k], x) for c in (self.chain.x_scale, self.chain.v_scale, self.chain.std))
        return (self.states.at(k + 1, i) - (x_scale * x + v_scale * self.drawn_by.at(k, i))) / std


Act = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, t, velocity of the flow) -> the velocity that takes the step: `tiltflow.flows.guided.Guided.guide`."""


def projection_of(velocity: Velocity) -> Callable[[Tensor], Tensor]:
    """Makes of standard normal noise that of a field; a plain function has no other."""
    return velocity.project if isinstance(velocity, VelocityField) else lambda noise: noise


@torch.no_grad()
@phase("rollout")
def sample(flow: Velocity, x: Tensor, sampling: Sampling, generator: Noise, *, start: Start = 0.0) -> Tensor:
    """Samples [batch, *event] at t = 1 from starting points x at time `start`."""
    solver, times = sampling.build(start), sampling.times(start)
    if isinstance(solver, OdeSolver):
        return solve(solver.states, flow, x, times)[-1]
    project = projection_of(flow)
    if isinstance(solver, StochasticSolver):
        noise = partial(_noise_like, generator=generator, project=project)
        return solve(partial(solver.states, noise=noise), flow, x, times)[-1]
    chain = solver.chain(times)
    for k in range(len(chain)):
        x = step(chain, k, x, flow(x, chain.times[k]), generator, project)
    return x


def _noise_like(x: Tensor, *, generator: Noise, project: Callable[[Tensor], Tensor]) -> Tensor:
    """Fresh noise of a field, of the shape of x."""
    return project(normal(x.shape, generator, x.dtype))


def simulate(
    flow: Velocity,
    x: Tensor,
    sampling: Sampling,
    generator: Noise,
    *,
    start: Start = 0.0,
    act: Act | None = None,
    storage: Storage = AS_COMPUTED,
) -> Trajectory:
    """A trajectory of any solver from starting points x at time `start`; see `rollout` and `rollout_ode`. A last step without
    noise is left out where others have some."""
    solver, times = sampling.build(start), sampling.times(start)
    if isinstance(solver, OdeSolver):
        return rollout_ode(solver.states, times, flow, x, act=act, storage=storage)
    if isinstance(solver, StochasticSolver):
        raise ValueError(f"{sampling.solver} is no chain of Gaussian steps")
    to_the_end = not solver.has_noise
    return rollout(solver.chain(times), flow, x, generator, act=act, to_the_end=to_the_end, storage=storage)


@phase("rollout")
def rollout(
    chain: Chain,
    flow: Velocity,
    x: Tensor,
    generator: Noise,
    *,
    act: Act | None = None,
    to_the_end: bool = False,
    storage: Storage = AS_COMPUTED,
) -> Trajectory:
    """Simulate the chain from x [batch, *event], keeping every state and velocity.

    A last step without noise is left out, unless it goes `to_the_end`: it cannot be controlled, so in training it belongs to
    the base, and the adjoint, which evaluates the base there anyway, takes it.

    Args:
        act: the steps are taken with its velocities instead of those of `flow`, which are kept all the same.
        storage: how they are kept; the steps themselves are taken without rounding.
    """
    count = len(chain) - int(chain.std[-1] == 0 and not to_the_end)
    states, velocities = storage.new(count + 1, x), storage.new(count, x)
    acting = None if act is None else storage.new(count, x)
    states[0] = x
    for k in range(count):
        v = velocities[k] = flow(x, chain.times[k])
        if act is not None and acting is not None:
            v = acting[k] = act(x, chain.times[k], v)
        x = step(chain, k, x, v, generator, projection_of(flow))
        states[k + 1] = x
    return Trajectory(chain, states, velocities, acting)


@phase("rollout")
def rollout_ode(
    solver: OdeFunction,
    times: Tensor,
    velocity: Velocity,
    x: Tensor,
    *,
    act: Act | None = None,
    storage: Storage = AS_COMPUTED,
) -> Trajectory:
    """Solve the ODE from x [batch, *event], keeping the state and the velocity at every time of the grid.

    A velocity that the solver asked for at a state of the grid is not computed again. To a method the path is one of Euler's
    method: the states are on the ODE's path to the solver's order, and the weights of a sum over them are those of `euler`.

    Args:
        act: the ODE is that of its velocities instead of those of `velocity`, which are kept all the same.

    Raises InputError as `solve` does.
    """
    asked: dict[float, tuple[Tensor, Tensor]] = {}  # the last state of each time: all of them would be several copies

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x, t)
        asked[float(t)] = x, v
        return (v if act is None else act(x, t, v)).clone()  # the solver may write into it

    found = solve(solver, recorded, x, times)
    states, velocities = storage.new(len(times), x), storage.new(len(times) - 1, x)
    for k, t in enumerate(times[:-1]):
        state, (at, v) = found[k], asked.pop(float(t), (None, None))
        velocities[k] = v if v is not None and at is state else velocity(state, t)
    for k in range(len(times)):
        states[k], found[k] = found[k], x  # which lets go of it
    return Trajectory(euler(times), states, velocities)


def solve(solver: OdeFunction, velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
    """The states of `solver`, which gets copies. Raises InputError if it does not return a state of its own, of the shape of x,
    for every time; UserCodeError if it raises an exception."""
    with explained("the solver"):
        states = solver(velocity, x.clone(), times.clone())
    if not isinstance(states, list) or len(states) != len(times):
        got = f"{len(states)} states" if isinstance(states, list) else type(states).__name__
        raise InputError(f"the solver must return a list of {len(times)} states, one for each time, got {got}")
    for state, t in zip(states, times, strict=True):
        if not isinstance(state, Tensor) or state.shape != x.shape:
            got = f"shape {list(state.shape)}" if isinstance(state, Tensor) else type(state).__name__
            raise InputError(f"the solver's state at t = {t:.4g} must be a tensor of shape {list(x.shape)}, got {got}")
    if len({(state.untyped_storage()._cdata, state.storage_offset()) for state in states}) < len(states):
        raise InputError("the solver returns one tensor for several times: x = x + h * v makes a new one, x += h * v does not")
    return states
