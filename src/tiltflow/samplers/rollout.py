"""Samples, and the trajectories that lead to them."""

# Mutation tests: test_sampler.py

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.flows.field import Velocity, VelocityField, Which
from tiltflow.samplers.chain import Chain, step
from tiltflow.samplers.grid import Start
from tiltflow.samplers.sampling import Sampling
from tiltflow.samplers.solver import OdeFunction, OdeSolver, StochasticSolver
from tiltflow.samplers.solvers.euler import euler
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
    states: list[Tensor]
    velocities: list[Tensor]
    acting: list[Tensor] | None = None

    def select(self, which: Which) -> Trajectory:
        """The trajectories of these samples."""
        states, velocities = ([part[which] for part in parts] for parts in (self.states, self.velocities))
        acting = None if self.acting is None else [v[which] for v in self.acting]
        return Trajectory(self.chain, states, velocities, acting)

    def in_one(self) -> tuple[Tensor, Tensor]:
        """The states [.., batch, *event] and the velocities [steps, batch, *event] in one tensor each. Those of the trajectory
        are parts of them from then on, so that there is one copy."""
        states = torch.stack(self.states)
        self.states[:] = states
        velocities = torch.stack(self.velocities)
        self.velocities[:] = velocities
        return states, velocities

    def noise(self) -> Tensor:
        """eps_k of each step, [steps, batch, *event]."""
        steps = zip(self.states, self.states[1:], self.acting or self.velocities, strict=False)
        return torch.stack(
            [(after - self.chain.mean(k, before, v)) / self.chain.std[k].item() for k, (before, after, v) in enumerate(steps)]
        )


Act = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, t, velocity of the flow) -> the velocity that takes the step: `tiltflow.flows.guided.Guided.guide`."""


def projection_of(velocity: Velocity) -> Callable[[Tensor], Tensor]:
    """Makes of standard normal noise that of a field; a plain function has no other."""
    return velocity.project if isinstance(velocity, VelocityField) else lambda noise: noise


@torch.no_grad()
@phase("rollout")
def sample(flow: Velocity, x: Tensor, sampling: Sampling, generator: Noise, *, start: Start = 0.0) -> Tensor:
    """Samples [batch, *event] at t = 1 from starting points x at time `start`."""
    solver, times = sampling.build(), sampling.times(start)
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
    generator: torch.Generator,
    *,
    start: Start = 0.0,
    act: Act | None = None,
) -> Trajectory:
    """A trajectory of any solver from starting points x at time `start`; see `rollout` and `rollout_ode`. A last step without
    noise is left out where others have some."""
    solver, times = sampling.build(), sampling.times(start)
    if isinstance(solver, OdeSolver):
        return rollout_ode(solver.states, times, flow, x, act=act)
    if isinstance(solver, StochasticSolver):
        raise ValueError(f"{sampling.solver} is no chain of Gaussian steps")
    return rollout(solver.chain(times), flow, x, generator, act=act, to_the_end=not solver.has_noise)


@phase("rollout")
def rollout(
    chain: Chain,
    flow: Velocity,
    x: Tensor,
    generator: torch.Generator,
    *,
    act: Act | None = None,
    to_the_end: bool = False,
) -> Trajectory:
    """Simulate the chain from x [batch, *event], keeping every state and velocity.

    A last step without noise is left out, unless it goes `to_the_end`: it cannot be controlled, so in training it belongs to
    the base, and the adjoint, which evaluates the base there anyway, takes it.

    Args:
        act: the steps are taken with its velocities instead of those of `flow`, which are kept all the same.
    """
    states, velocities, acting = [x], [], list[Tensor]()
    for k in range(len(chain) - int(chain.std[-1] == 0 and not to_the_end)):
        v = flow(x, chain.times[k])
        velocities.append(v)
        if act is not None:
            v = act(x, chain.times[k], v)
            acting.append(v)
        x = step(chain, k, x, v, generator, projection_of(flow))
        states.append(x)
    return Trajectory(chain, states, velocities, None if act is None else acting)


@phase("rollout")
def rollout_ode(solver: OdeFunction, times: Tensor, velocity: Velocity, x: Tensor, *, act: Act | None = None) -> Trajectory:
    """Solve the ODE from x [batch, *event], keeping the state and the velocity at every time of the grid.

    A velocity that the solver asked for at a state of the grid is not computed again. To a method the path is one of Euler's
    method: the states are on the ODE's path to the solver's order, and the weights of a sum over them are those of `euler`.

    Args:
        act: the ODE is that of its velocities instead of those of `velocity`, which are kept all the same.

    Raises InputError as `solve` does.
    """
    asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x, t)
        asked.append((x, t, v))
        return (v if act is None else act(x, t, v)).clone()  # the solver may write into it

    states = solve(solver, recorded, x, times)
    known = {(id(x), float(t)): v for x, t, v in asked}
    velocities = [
        known[id(state), float(t)] if (id(state), float(t)) in known else velocity(state, t)
        for state, t in zip(states[:-1], times, strict=False)
    ]
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
    if len({state.data_ptr() for state in states}) < len(states):
        raise InputError("the solver returns one tensor for several times: x = x + h * v makes a new one, x += h * v does not")
    return states
