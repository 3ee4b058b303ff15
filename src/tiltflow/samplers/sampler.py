r"""Samplers, as the Markov chains that they are.

Every sampler here that evaluates the network once a step is a chain of Gaussian steps on the linear path,

    x_{k+1} = x_scale_k x_k + v_scale_k v(x_k, t_k) + std_k eps_k,      k = 0 .. K - 1,  t_0 ~ 0 < .. < t_K = 1,

so a sampler is three numbers a step. With the same three numbers, a change of velocity v -> v + dv is the control
w_k = v_scale_k dv / std_k, the KL divergence between two chains is sum_k E|w_k|^2 / 2, exactly, and the adjoint of a
step is x_scale_k a + v_scale_k J_v^T a. No method needs to know which sampler it runs on.

Which sampler when (variance of the result over the true one, exact velocity, data N(0.7, 0.25), 10 / 20 / 40 steps):

    euler               0.742  0.862  0.929   the ODE: no noise, nothing to tune against; good for sampling
    memoryless          1.018  1.004  1.001   without the noiseless last step; 1.028 / 1.005 / 1.001 with it: the default
    memoryless_offset   1.326  1.178  1.093   as printed in 2409.08861: its drift fits another noise level than its noise
    ddim(eta=1)         0.597  0.750  0.856   DDPM's posterior steps: memoryless, biased to small variance

Solvers that are no such chain (several evaluations a step, several steps of memory, or a function of yours) integrate the
ODE. Of their trajectories too the visited states and velocities are kept, which is all that a policy gradient needs.
"""

# Mutation tests: test_sampler.py

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from tiltflow.errors import InputError, did_you_mean
from tiltflow.flows.field import Velocity, Which
from tiltflow.flows.flow import Flow
from tiltflow.plugins import import_function
from tiltflow.settings import External, Settings
from tiltflow.streams import normal
from tiltflow.user_code import explained


@dataclass(frozen=True)
class Chain:
    """A sampler on a time grid. `times` is [K + 1], the rest [K], all float64 on the CPU. `price`: see `energy`."""

    times: Tensor
    x_scale: Tensor
    v_scale: Tensor
    std: Tensor
    price: Tensor | None = None

    def __len__(self) -> int:
        return len(self.std)

    def mean(self, k: int, x: Tensor, v: Tensor) -> Tensor:
        """The mean of x_{k+1} given x_k = x and its velocity, both [batch, *event]."""
        return self.x_scale[k].item() * x + self.v_scale[k].item() * v

    @property
    def control_scale(self) -> Tensor:
        """[K]: what turns a change of velocity into the control w_k; 0 where a step has no noise and cannot be controlled."""
        return torch.where(self.std > 0, self.v_scale / self.std, 0.0)

    @property
    def energy(self) -> Tensor:
        """[K]: a change of the velocities by dv_k costs sum_k energy_k E|dv_k|^2 / 2. This is the path KL between the two
        chains, unless the sampler sets another price."""
        return self.control_scale**2 if self.price is None else self.price


@dataclass(frozen=True)
class Trajectory:
    """One simulated batch: the states x_0, x_1, .. and the velocities of the flow there, all [batch, *event].

    Args:
        acting: the velocities that took the steps, where they are others: guided ones.
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

    def noise(self) -> Tensor:
        """eps_k of each step, [steps, batch, *event]."""
        steps = zip(self.states, self.states[1:], self.acting or self.velocities, strict=False)
        return torch.stack(
            [(after - self.chain.mean(k, before, v)) / self.chain.std[k].item() for k, (before, after, v) in enumerate(steps)]
        )


Act = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, t, velocity of the flow) -> the velocity that takes the step: `tiltflow.flows.guided.Guided.guide`."""


Start = float | Callable[[int], Tensor]
"""Where sampling begins: a time, from which the grid of `Sampling` is spread; or the grid of a model that has its own, from the
number of steps K to K + 1 times, float64."""


def time_grid(num_inference_steps: int, *, start: float = 0.0, shift: float = 1.0) -> Tensor:
    """K + 1 times from `start` to 1, float64, spread by `spread_times`."""
    return spread_times(torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float64), start=start, shift=shift)


def spread_times(u: Tensor, *, start: float = 0.0, shift: float = 1.0) -> Tensor:
    """u in [0, 1] -> times in [start, 1]. shift > 1 moves them to the noise, as in diffusers' flow schedulers: 1 - u goes to
    shift (1 - u) / (1 + (shift - 1) (1 - u))."""
    noise = 1 - u
    noise = shift * noise / (1 + (shift - 1) * noise)
    return start + (1 - start) * (1 - noise)


def euler(times: Tensor) -> Chain:
    """The probability-flow ODE by Euler's method, order 1; on a diffusion model it is deterministic DDIM (2010.02502).

    A deterministic path has no path KL: its energy is that of the same change of velocity in the memoryless SDE, the integral
    of 2 t / (1 - t), by the midpoint rule: a transport cost.
    """
    h, middle = times.diff(), (times[:-1] + times[1:]) / 2
    return Chain(times, torch.ones_like(h), h, torch.zeros_like(h), h * 2 * middle / (1 - middle))


def sde(times: Tensor, sigma: Callable[[Tensor], Tensor]) -> Chain:
    r"""Euler-Maruyama of dX = (v + sigma^2 / (2 eta) (v - kappa X)) dt + sigma dB (2409.08861, eq. 4).

    The marginals are those of the ODE for every sigma(t) [K] -> [K], finite on the grid without its last time.
    On the linear path the bracket is sigma^2 (t v - x) / (2 (1 - t)): finite at t = 0.
    """
    t, h = times[:-1], times.diff()
    variance = sigma(t) ** 2
    pull = variance / (2 * (1 - t))
    return Chain(times, 1 - h * pull, h * (1 + pull * t), (h * variance).sqrt())


def memoryless_sigma(t: Tensor) -> Tensor:
    """sqrt(2 eta) = sqrt(2 (1 - t) / t) on the linear path; infinite at t = 0."""
    return (2 * (1 - t) / t).sqrt()


def memoryless(times: Tensor, *, denoise: bool = True) -> Chain:
    r"""Memoryless first jump, then Euler-Maruyama with exact kappa and sigma^2 = 2 eta.

    The first step draws x_{t_1} = t_1 x1hat(x_0) + (1 - t_1) eps afresh: for an exact model x1hat does not depend on pure
    noise, so the chain forgets x_0 exactly, nothing is infinite, and there is no offset to tune. With `denoise` the last
    step follows the ODE without noise (its std would be h sqrt(2 / (1 - h))); it is not controlled.
    """
    after_jump = sde(times[1:], memoryless_sigma)
    t, s = times[0], times[1]
    chain = Chain(
        times,
        torch.cat([s[None], after_jump.x_scale]),
        torch.cat([(s * (1 - t))[None], after_jump.v_scale]),
        torch.cat([(1 - s)[None], after_jump.std]),
    )
    return _replace_last(chain, euler(times)) if denoise else chain


def memoryless_offset(times: Tensor) -> Chain:
    """The scheme of 2409.08861, appendix G, on a uniform grid of step h: drift 2 v - x / (t + h) and
    sigma^2 = 2 (1 - t + h) / (t + h). The drift preserves the marginals for sigma^2 = 2 eta only: biased at order h."""
    t, h = times[:-1], times.diff()
    return Chain(times, 1 - h / (t + h), 2 * h, (h * 2 * (1 - t + h) / (t + h)).sqrt())


def ddim(times: Tensor, eta: float = 0.0) -> Chain:
    r"""DDIM(eta) steps (2010.02502, eq. 12 and 16); eta = 1 is DDPM's posterior sampling, memoryless; eta = 0 is `euler`.

    x' = alpha' x1hat + sqrt(beta'^2 - std^2) x0hat + std eps with std = eta beta' sqrt(1 - r^2), r = alpha beta' / alpha' beta.
    Free of the scale of x, hence the same on the linear path. The step to t = 1 has no noise.

    Its energy is the continuous path KL of one step, ((1 + eta^2) / 2 eta)^2 log(alpha'^2 / alpha^2) |change of score|^2, and
    not the KL of its Gaussian transitions: of that, one late step makes up half or more, and the sum changes with the number
    of steps (at eta = 1 on Stable Diffusion's schedule by 3.6 times between 50 steps and 10, the continuous one by 1.4). From
    pure noise, where that logarithm is infinite, the first step has the KL of its transition.
    """
    t, s = times[:-1], times[1:]
    ratio = (t * (1 - s)) / (s * (1 - t))
    std = eta * (1 - s) * (1 - ratio**2).clamp(min=0).sqrt()
    rest = ((1 - s) ** 2 - std**2).clamp(min=0).sqrt()
    chain = Chain(times, s + rest, s * (1 - t) - rest * t, std)
    if eta == 0:
        return replace(chain, price=euler(times).energy)
    alpha, beta = _variance_preserving(times)
    continuous = ((1 + eta**2) / (2 * eta)) ** 2 * 2 * (alpha[1:] / alpha[:-1]).log() * (t / beta[:-1]) ** 2
    return replace(chain, price=torch.where(t > 0, continuous, chain.energy))


def euler_maruyama(times: Tensor, eta: float = 1.0) -> Chain:
    r"""Euler-Maruyama of a variance-preserving diffusion in its own coordinates X and its own time,

    dX = (X / 2 + (1 + eta^2) / 2 score(X)) dtau + eta dB,     tau = 2 log alpha                    (2011.13456, eq. 6)

    on the steps of tau that `times` imply (uniform ones by `Sampling`): what a continuous-time formula for the score as the
    action means on a grid, and the chain whose optimum the problem `lqg` knows exactly. Needs times above 0. At eta = 0 its
    energy is that of `euler`.
    """
    alpha, beta = _variance_preserving(times)
    scale, step = alpha + beta, 2 * (alpha[1:] / alpha[:-1]).log()
    pull = (1 + eta**2) / 2 * step / beta[:-1]  # the score of X is -x0hat / beta, with x0hat = x - t v on the linear path
    x_scale = (scale[:-1] * (1 + step / 2) - pull) / scale[1:]
    price = euler(times).energy if eta == 0 else None
    return Chain(times, x_scale, pull * times[:-1] / scale[1:], eta * step.sqrt() / scale[1:], price)


def _variance_preserving(times: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and beta of a variance-preserving path at linear times: alpha / beta = t / (1 - t), alpha^2 + beta^2 = 1."""
    norm = torch.hypot(times, 1 - times)
    return times / norm, (1 - times) / norm


def _replace_last(chain: Chain, other: Chain) -> Chain:
    def last(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.cat([ours[:-1], theirs[-1:]])

    parts = ("x_scale", "v_scale", "std", "energy")  # the last of these is the price
    return Chain(chain.times, *(last(getattr(chain, part), getattr(other, part)) for part in parts))


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
        x = step(chain, k, x, v, generator)
        states.append(x)
    return Trajectory(chain, states, velocities, None if act is None else acting)


@torch.no_grad()
def path_costs(chain: Chain, tuned: Velocity, base: Velocity, x: Tensor, generator: torch.Generator) -> Tensor:
    """sum_k |w_k|^2 / 2 along fresh paths of the tuned chain from x [batch, *event], in nats: [batch], float64. Its mean is the
    KL divergence of the tuned paths from those of the base, which is at least that of the samples they end in."""
    path = rollout(chain, tuned, x, generator)
    costs = torch.zeros(len(x), dtype=torch.float64)
    for k, (state, v) in enumerate(zip(path.states, path.velocities, strict=False)):
        change = v - base(state, chain.times[k])
        costs += chain.control_scale[k].item() ** 2 / 2 * change.flatten(1).double().square().sum(1).cpu()
    return costs


def step(chain: Chain, k: int, x: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
    """x_{k+1} from x_k = x and its velocity."""
    mean, std = chain.mean(k, x, v), chain.std[k].item()
    if std == 0:
        return mean
    return mean + std * normal(x.shape, generator, x.dtype)


OdeSolver = Callable[[Velocity, Tensor, Tensor], list[Tensor]]
"""(velocity, x [batch, *event] at the first time, times [K + 1]) -> the K + 1 states at those times, x first: heun, dpm_solver,
or a function of your own, which may evaluate the velocity wherever and as often as it likes."""


def heun(velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
    """The probability-flow ODE by Heun's method, order 2, two evaluations a step but one in the last, whose end is singular
    for some predictions."""
    states = [x]
    for k in range(len(times) - 1):
        h = (times[k + 1] - times[k]).item()
        v = velocity(x, times[k])
        end = x + h * v
        x = end if k == len(times) - 2 else x + h / 2 * (v + velocity(end, times[k + 1]))
        states.append(x)
    return states


def dpm_solver(velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
    """The probability-flow ODE by DPM-Solver++(2M) (2211.01095, algorithm 2): order 2 at one evaluation a step.

    It extrapolates the denoised sample x1hat linearly in log(t / (1 - t)). The first step, and the last one to t = 1, where
    that is infinite, are of order 1.
    """
    states, before = [x], x
    log_snr = torch.logit(times)
    for k in range(len(times) - 1):
        t, s = times[k].item(), times[k + 1].item()
        x1 = x + (1 - t) * velocity(x, times[k])
        ahead = x1
        if k > 0 and s < 1:
            ahead = x1 + ((log_snr[k + 1] - log_snr[k]) / (2 * (log_snr[k] - log_snr[k - 1]))).item() * (x1 - before)
        x, before = (1 - s) / (1 - t) * x + (s - t * (1 - s) / (1 - t)) * ahead, x1
        states.append(x)
    return states


def solve(solver: OdeSolver, velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
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


def rollout_ode(solver: OdeSolver, times: Tensor, velocity: Velocity, x: Tensor, *, act: Act | None = None) -> Trajectory:
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


CHAINS = ("memoryless", "memoryless-offset", "ddpm", "ddim", "euler", "euler-maruyama")
ODE_SOLVERS: dict[str, OdeSolver] = {"heun": heun, "dpm-solver++": dpm_solver}


def _known(solver: str) -> str:
    known = (*CHAINS, *ODE_SOLVERS)
    if solver not in known and ":" not in solver:
        raise ValueError(f"there is no solver {solver!r}{did_you_mean(solver, known)}")
    return solver


Solver = Annotated[str, AfterValidator(_known), External(only_functions=True)]
"""The name of a solver, or `package.module:function`."""


class Sampling(Settings):
    """How to sample: which solver, on which grid."""

    solver: Solver = "memoryless"
    """memoryless, memoryless-offset, ddpm, ddim, euler, euler-maruyama, heun, dpm-solver++, or `package.module:function`, an
    `OdeSolver` of your own."""
    num_inference_steps: Annotated[int, Field(ge=1)] = 40
    """Steps from noise to data."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, steps are smaller near the noise; see `time_grid`."""
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The noise of the `ddim` and `euler-maruyama` solvers: 0 is deterministic, 1 is DDPM."""

    @property
    def is_chain(self) -> bool:
        """Whether the solver is a chain of Gaussian steps, with or without noise."""
        return self.solver in CHAINS

    @property
    def has_noise(self) -> bool:
        """Whether its steps are random."""
        return self.is_chain and self.solver != "euler" and (self.eta > 0 or self.solver not in ("ddim", "euler-maruyama"))

    def limits(self, start: Start = 0.0) -> list[str]:
        """Why a method that controls this sampler, begun at time `start`, does not aim at p_base exp(r / beta) exactly: one
        sentence for each reason; none for the memoryless samplers from pure noise."""
        if not self.has_noise:
            return [
                f"The solver {self.solver} has no noise, so there is no path KL: what is paid for is the transport of the"
                " samples, and the optimum of that is not the tilted law."
            ]
        begin = self.times(start)[0] if callable(start) else torch.tensor(start, dtype=torch.float64)
        reasons, signal = [], _variance_preserving(begin)[0].item() ** 2
        if self.solver in ("ddim", "euler-maruyama") and self.eta < 1:
            reasons.append(
                f"The solver {self.solver} with eta = {self.eta:g} is not memoryless: a sample depends on the noise that it"
                " started from, which training cannot tilt (initial-value bias)."
            )
        if self.solver == "memoryless-offset":
            reasons.append(
                "The solver memoryless-offset is biased at the order of its step, and remembers a little of its start."
            )
        if signal > 1e-3:
            reasons.append(
                f"The model's noise end still holds {signal:.1%} of the data's variance, which training cannot tilt"
                " (initial-value bias)."
            )
        return reasons

    def times(self, start: Start = 0.0) -> Tensor:
        """The grid from `start` to 1: [num_inference_steps + 1], float64.

        Raises InputError for euler-maruyama at start 0: the time of that process is infinite there; and for a shift of a model
        that has its own grid.
        """
        if callable(start):
            if self.shift != 1:
                raise InputError(f"shift {self.shift:g}: the model has its own time grid; leave shift at 1")
            return start(self.num_inference_steps)
        if self.solver != "euler-maruyama":
            return time_grid(self.num_inference_steps, start=start, shift=self.shift)
        if start <= 0:
            raise InputError("solver euler-maruyama needs a diffusion model, which starts above t = 0; use memoryless here")
        alpha = _variance_preserving(torch.tensor([start], dtype=torch.float64))[0] ** torch.linspace(
            1, 0, self.num_inference_steps + 1, dtype=torch.float64
        )
        return alpha / (alpha + (1 - alpha**2).sqrt())

    def chain(self, start: Start = 0.0) -> Chain:
        """The chain of this solver from time `start`. Raises ValueError for a solver that is not one."""
        times = self.times(start)
        match self.solver:
            case "memoryless":
                return memoryless(times)
            case "memoryless-offset":
                return memoryless_offset(times)
            case "ddpm":
                return ddim(times, eta=1.0)
            case "ddim":
                return ddim(times, eta=self.eta)
            case "euler":
                return euler(times)
            case "euler-maruyama":
                return euler_maruyama(times, self.eta)
            case _:
                raise ValueError(f"{self.solver} is no chain of Gaussian steps")

    def ode_solver(self) -> OdeSolver:
        """The solver that is not a chain. Raises InputError if a function of the user cannot be imported."""
        return ODE_SOLVERS.get(self.solver) or cast(OdeSolver, import_function(self.solver, "solver"))


def check_sampling(sampling: Any) -> None:
    """Raises InputError if it is neither a Sampling nor None."""
    if sampling is not None and not isinstance(sampling, Sampling):
        raise InputError(f"sampling must be a Sampling(solver=.., num_inference_steps=..), is {sampling!r}")


def noise(flow: Flow, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Starting points [batch, *event] on the linear path: standard normal in the coordinates of the flow's interpolant."""
    draw = normal(shape, generator, dtype)
    c = flow.interpolant(torch.zeros((), dtype=torch.float64))
    return draw / (c.alpha + c.beta).item()


@torch.no_grad()
def sample(flow: Velocity, x: Tensor, sampling: Sampling, generator: torch.Generator, *, start: Start = 0.0) -> Tensor:
    """Samples [batch, *event] at t = 1 from starting points x at time `start`."""
    if not sampling.is_chain:
        return solve(sampling.ode_solver(), flow, x, sampling.times(start))[-1]
    chain = sampling.chain(start)
    for k in range(len(chain)):
        x = step(chain, k, x, flow(x, chain.times[k]), generator)
    return x
