"""Verification on the linear-quadratic-Gaussian problem: the method's own code against exact gradients and optima.

Two questions. Is the policy gradient of the method right? At the problem's (K, k), for every estimator, with the exact value
function of the chain, from many trajectories at once, against the exact gradient of that chain. Does training reach the
optimum? From the base, with a linear policy whose slope and intercept are polynomials of time, the critic being learned.
"""

# Mutation tests: test_lqg.py test_score_as_action.py

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor, nn

from tiltflow.control.value import FORMS, Value
from tiltflow.evaluation.estimates import distance_to_law, mean_estimate
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import VariancePreserving
from tiltflow.laws.lqg import Lqg, Solution, chain_optimum, evaluate_chain, evaluate_policy, optimum
from tiltflow.laws.problems import QuadraticReward
from tiltflow.methods.score_as_action import ScoreAsAction, State
from tiltflow.networks.quadratic import chebyshev
from tiltflow.plugins import part_of
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Settings
from tiltflow.streams import stream
from tiltflow.training.batch import Batch
from tiltflow.training.trainer import Record, train

Count = Annotated[int, Field(ge=1)]
ESTIMATORS = ("return", "return-minus-value", "temporal-difference", "closed-form", "pathwise")


class LqgVerification(Settings):
    """What `tiltflow verify lqg` runs. Every number can be set from the command line."""

    problem: Lqg = Lqg()
    method: Annotated[Any, BeforeValidator(part_of("methods"))]
    iterations: Count = 400
    """Optimizer steps."""
    train_batch_size: Count = 512
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.98
    degree: Annotated[int, Field(ge=0)] = 4
    """Of the polynomials of time that are the slope and the intercept of the policy."""
    evaluate_steps: tuple[Count, ...] = (5, 10, 50, 100)
    """Numbers of steps at which the trained policy is evaluated, exactly, beside the one it was trained at."""
    trajectories: Annotated[int, Field(ge=2)] = 40_000
    """For the estimates of the gradient."""
    num_samples: Annotated[int, Field(ge=100)] = 20_000
    draws: Annotated[int, Field(ge=2)] = 10
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_sampler(self) -> LqgVerification:
        if getattr(self.method, "eta", 1.0) != self.problem.eta:
            raise ValueError("problem.eta and method.eta are the noise of one sampler: they must be the same")
        return self


class LinearPolicy(nn.Module):
    """Epsilon of the score -(x - a m) / v + K(s) x + k(s), in the diffusion's own coordinates, for x [batch, dimension] and its
    time s [batch] in [0, 1]. K and k are Chebyshev polynomials of s, 0 at the start."""

    def __init__(self, problem: Lqg, degree: int):
        super().__init__()
        self.problem, self.coefficients = problem, nn.Parameter(torch.zeros(2, degree + 1))

    def at(self, s: Tensor) -> Tensor:
        """K and k: [2, batch]."""
        policy: Tensor = self.coefficients @ chebyshev(s, self.coefficients.shape[1] - 1)
        return policy

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return epsilon(self.problem, x, s, *self.at(s))


class OnePolicyEach(nn.Module):
    """The constant policy (K, k), as one pair of parameters for each of `batch` trajectories, so that the gradient of a batch
    is that of its trajectories one by one."""

    def __init__(self, problem: Lqg, batch: int):
        super().__init__()
        self.problem = problem
        self.coefficients = nn.Parameter(torch.tensor([[problem.K], [problem.k]]).expand(2, batch).clone())

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        return epsilon(self.problem, x, s, *self.coefficients)


class QuadraticValue(nn.Module):
    """The exact value function of a chain of N steps: (x [batch, dimension] on the linear path, time [batch]) -> [batch, 1]."""

    def __init__(self, problem: Lqg, solution: Solution, times: Tensor):
        super().__init__()
        table = np.array([solution.value(n) for n in range(len(times))])
        self.times, self.table, self.scale = times, torch.from_numpy(table), own_scale(times)
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        step = torch.bucketize(time.double().contiguous(), (self.times[:-1] + self.times[1:]) / 2)
        P, p, c = self.table.to(x)[step, :, None].unbind(1)
        own = x * self.scale.to(x)[step, None]
        value: Tensor = -P * own.square() / 2 + p * own + c
        return value.sum(1, keepdim=True)


def own_scale(t: Tensor) -> Tensor:
    """alpha + beta: what turns a state on the linear path at time t into the diffusion's own coordinates."""
    return 1 / torch.hypot(t, 1 - t)


def interpolant(problem: Lqg) -> VariancePreserving:
    """The problem's diffusion: its noise passes at rate 1 for T units of time."""
    return VariancePreserving(beta_min=problem.T, beta_max=problem.T)


def epsilon(problem: Lqg, x: Tensor, s: Tensor, K: Tensor, k: Tensor) -> Tensor:
    """-beta(s) (score + K x + k) for x [batch, dimension] and s, K, k [batch]."""
    square = torch.exp(problem.T * (s - 1))[:, None]
    score = -(x - square.sqrt() * problem.mean) / (square * problem.variance + 1 - square)
    predicted: Tensor = -(1 - square).sqrt() * (score + K[:, None] * x + k[:, None])
    return predicted


def base_flow(problem: Lqg) -> Flow:
    """The exact base."""
    return Flow(LinearPolicy(problem, 0).requires_grad_(False), "epsilon", interpolant(problem))


def draw_start(problem: Lqg, count: int, start: float, generator: torch.Generator) -> Tensor:
    """X_0 on the linear path: [count, dimension]."""
    mean, variance = problem.start()
    noise = torch.randn(count, problem.dimension, generator=generator, dtype=torch.get_default_dtype())
    x: Tensor = mean + variance**0.5 * noise
    return x / own_scale(torch.tensor(start, dtype=torch.float64)).item()


def reward_of(problem: Lqg) -> QuadraticReward:
    return QuadraticReward(torch.full((problem.dimension,), problem.q, dtype=torch.float64), problem.Q)


def gradient_samples(problem: Lqg, method: ScoreAsAction, trajectories: int, seed: int) -> Tensor:
    """The method's estimate of dJ/d(K, k) at the problem's policy from each of so many trajectories, with the exact value
    function of the chain: [2, trajectories], in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        base = base_flow(problem)
        tuned = Flow(OnePolicyEach(problem, trajectories), "epsilon", interpolant(problem))
        start, steps = base.noise_time, method.num_inference_steps
        constant = np.full(steps, problem.K), np.full(steps, problem.k)
        exact = evaluate_chain(problem, method.beta, *constant)
        value = Value(QuadraticValue(problem, exact, method.sampling.times(start)), FORMS["reward-free"])
        value.fitted = True
        state = State(value, torch.optim.SGD(value.network.parameters(), lr=0.0))
        frozen = method.critic.model_copy(update={"num_steps": 0})
        once = method.model_copy(update={"num_passes": 1, "train_timesteps": None, "critic": frozen})
        x = draw_start(problem, trajectories, start, stream(seed, "start"))
        reward, generator = reward_of(problem), stream(seed, "gradient", method.estimator)
        batch = Batch(x, tuned, base, reward, generator, start=start, micro_batch_size=trajectories)
        next(once.gradients(batch, state))
        (coefficients,) = tuned.parameters()
        assert coefficients.grad is not None
        return -coefficients.grad * (trajectories * method.beta)
    finally:
        torch.set_default_dtype(before)


def check_gradients(settings: LqgVerification) -> dict[str, Any]:
    """For each estimator: estimates of dJ/dK and dJ/dk, standard errors, z-scores and the variance of one trajectory."""
    problem, method = settings.problem, settings.method
    steps = method.num_inference_steps
    exact = evaluate_chain(problem, method.beta, np.full(steps, problem.K), np.full(steps, problem.k)).gradient
    result: dict[str, Any] = {}
    for estimator in ESTIMATORS:
        changed = method.model_copy(
            update={"estimator": estimator, "update": "trust-region", "standardize": False, "running_reward": "path-kl"}
        )
        samples = gradient_samples(problem, changed, settings.trajectories, settings.seed)
        estimates = [mean_estimate(part) for part in samples]
        result[estimator] = {
            "gradient": [estimate.value for estimate in estimates],
            "error": [estimate.standard_error for estimate in estimates],
            "z": [(estimate.value - truth) / estimate.standard_error for estimate, truth in zip(estimates, exact, strict=True)],
            "variance": samples.var(1).tolist(),
        }
    return result


def policy_at(policy: LinearPolicy, steps: int) -> tuple[Any, Any]:
    """K and k of a policy at the times of a chain of so many steps: [steps] each, float64."""
    with torch.no_grad():
        K, k = policy.at(torch.arange(steps).to(policy.coefficients) / steps).double().numpy()
    return K, k


def control_error(problem: Lqg, best: Solution, K: Any, k: Any) -> float:
    """sqrt(E sum |u - u*|^2 / E sum |u*|^2) of policies K, k [N] over the chain's optimal process."""
    (mean, variance), wrong, right, D = problem.start(), 0.0, 0.0, problem.T / len(K)
    for n in range(len(K)):
        (slope, intercept), (F, h), square = best.policy(n), problem.drift(n * D), mean**2 + variance
        a, b = K[n] - slope, k[n] - intercept
        wrong += a**2 * square + 2 * a * b * mean + b**2
        right += slope**2 * square + 2 * slope * intercept * mean + intercept**2
        A, B = 1 + (F + problem.gain * slope) * D, (h + problem.gain * intercept) * D
        mean, variance = A * mean + B, A**2 * variance + problem.eta**2 * D
    return float((wrong / right) ** 0.5) if right > 0 else float((wrong / len(K)) ** 0.5)


def verify_lqg(settings: LqgVerification, watch: Callable[[Record], None] = lambda record: None) -> dict[str, Any]:
    """Check the gradients, train, then measure. `watch` is shown every training record."""
    problem, method = settings.problem, settings.method
    steps, beta = method.num_inference_steps, method.beta
    base = base_flow(problem)
    policy = LinearPolicy(problem, settings.degree)
    tuned, start = Flow(policy, "epsilon", interpolant(problem)), base.noise_time
    gradients = check_gradients(settings) if isinstance(method, ScoreAsAction) else None

    record = None
    for record in train(
        tuned,
        base,
        method,
        reward_of(problem),
        lambda generator: draw_start(problem, settings.train_batch_size, start, generator),
        max_train_steps=settings.iterations,
        seed=settings.seed,
        start=start,
        ema_decay=settings.ema_decay,
    ):
        watch(record)
    assert record is not None

    continuous, best = evaluate_policy(problem, beta), optimum(problem, beta)
    chain = evaluate_chain(problem, beta, np.full(steps, problem.K), np.full(steps, problem.k))
    best_chain, found = chain_optimum(problem, beta, steps), evaluate_chain(problem, beta, *policy_at(policy, steps))
    at_other_steps = {
        str(n): {
            "objective": evaluate_chain(problem, beta, *policy_at(policy, n)).objective,
            "optimum": chain_optimum(problem, beta, n).objective,
        }
        for n in sorted({*settings.evaluate_steps, steps})
    }
    generator = stream(settings.seed, "evaluation")
    sampling = Sampling(solver="euler-maruyama", num_inference_steps=steps, eta=problem.eta)
    x0 = draw_start(problem, settings.num_samples, start, generator)
    x = sample(tuned, x0, sampling, generator, start=start)
    x_base = sample(base, x0, sampling, generator, start=start)

    def exact(count: int, generator: torch.Generator) -> Tensor:
        noise = torch.randn(count, problem.dimension, generator=generator, dtype=torch.float64)
        x: Tensor = best_chain.mean + best_chain.variance**0.5 * noise
        return x

    law, before = (
        distance_to_law(
            y, exact, stream(settings.seed, "exact"), directions=stream(settings.seed, "directions"), draws=settings.draws
        )
        for y in (x, x_base)
    )
    reward = reward_of(problem)
    tilt_mean, tilt_variance = problem.tilted(beta)
    size, mean = problem.dimension, mean_estimate(reward(x))
    return {
        "problem": problem.name,
        "method": method.name,
        "distance": law.distance,
        "floor": law.floor,
        "floor_std": law.floor_std,
        "distance_base": before.distance,
        "initial_value_bias": float(
            ((best.mean - tilt_mean) ** 2 + (best.variance**0.5 - tilt_variance**0.5) ** 2) ** 0.5 * size**0.5
        ),
        "reward": mean.value,
        "reward_error": mean.standard_error,
        "reward_exact": size * (problem.q * best_chain.mean - problem.Q * (best_chain.mean**2 + best_chain.variance) / 2),
        "control_error": control_error(problem, best_chain, *policy_at(policy, steps)),
        "objective": found.objective,
        "objective_exact": best_chain.objective,
        "objective_base": evaluate_chain(problem, beta, np.zeros(steps), np.zeros(steps)).objective,
        "objective_continuous": best.objective,
        "path_kl": found.path_kl,
        "path_kl_exact": best_chain.path_kl,
        "at_other_steps": at_other_steps,
        "policy": {
            "K": problem.K,
            "k": problem.k,
            "objective": continuous.objective,
            "gradient": list(continuous.gradient),
            "value": dict(zip("Ppc", map(float, continuous.value(0.0)), strict=True)),
            "terminal_mean": continuous.mean,
            "terminal_variance": continuous.variance,
            "num_inference_steps": steps,
            "objective_of_chain": chain.objective,
            "gradient_of_chain": list(chain.gradient),
        },
        "optimum": {
            "value": dict(zip("Ppc", map(float, best.value(0.0)), strict=True)),
            "K": float(best.policy(0.0)[0]),
            "k": float(best.policy(0.0)[1]),
            "terminal_mean": best.mean,
            "terminal_variance": best.variance,
            "path_kl": best.path_kl,
            "tilted_mean": tilt_mean,
            "tilted_variance": tilt_variance,
        },
        "gradients": gradients,
        "iterations": settings.iterations,
        "network_evaluations": record.network_evaluations,
        "evaluations_per_trajectory": record.network_evaluations / (settings.iterations * settings.train_batch_size),
        "seconds": record.seconds,
        "seed": settings.seed,
    }
