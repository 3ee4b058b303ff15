"""Policy gradients of Score as Action on the linear-quadratic-Gaussian problem, against the exact gradient of the chain."""

# Mutation tests: test_score_as_action.py

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tiltflow.control.value import FORMS, Value
from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.flows.flow import Flow
from tiltflow.laws.lqg import Lqg, evaluate_chain
from tiltflow.laws.lqg_fields import (
    OnePolicyEach,
    QuadraticValue,
    base_flow,
    draw_start,
    interpolant,
    reward_of,
    running_reward_of,
)
from tiltflow.methods.score_as_action import ScoreAsAction, State
from tiltflow.problems import Check, Table
from tiltflow.streams import stream
from tiltflow.training.batch import Batch

ESTIMATORS = ("return", "return-minus-value", "temporal-difference", "closed-form", "pathwise")


@dataclass(frozen=True)
class Gradient:
    """An estimator's dJ/dK and dJ/dk, against those of the chain, and the variances of one trajectory."""

    checks: list[Check]
    variance: list[float]

    def values(self) -> dict[str, list[float | None]]:
        """The numbers, by name."""
        return {
            "gradient": [check.value for check in self.checks],
            "error": [check.error for check in self.checks],
            "z": [check.z for check in self.checks],
            "variance": [*self.variance],
        }


def check_gradients(problem: Lqg, method: ScoreAsAction, trajectories: int, seed: int) -> dict[str, Gradient]:
    """The estimates of every estimator at the problem's policy, from so many trajectories each, against the exact gradient."""
    steps = method.num_inference_steps
    theory = evaluate_chain(problem, method.beta, np.full(steps, problem.K), np.full(steps, problem.k)).gradient
    found = {}
    for estimator in ESTIMATORS:
        changed = method.model_copy(
            update={"estimator": estimator, "update": "trust-region", "standardize": False, "running_reward": "path-kl"}
        )
        samples = gradient_samples(problem, changed, trajectories, seed)
        means = [mean_estimate(part) for part in samples]
        checks = [Check(m.value, m.standard_error, truth, format=".3f") for m, truth in zip(means, theory, strict=True)]
        found[estimator] = Gradient(checks, samples.var(1).tolist())
    return found


def gradients_table(gradients: Mapping[str, Gradient]) -> Table:
    """The estimates of the gradient, their z-scores, and their variances beside the plain estimator's."""
    reference = gradients["return"].variance
    rows = {}
    for name, row in gradients.items():
        slope, intercept = row.checks
        ratios = ", ".join(f"1 / {r / v:.1f}" for r, v in zip(reference, row.variance, strict=True))
        rows[name] = [slope.estimate, f"{slope.z:+.1f}", intercept.estimate, f"{intercept.z:+.1f}", ratios]
    return Table("estimator", rows, ("dJ/dK", "z", "dJ/dk", "z", "variance"))


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
        solution = evaluate_chain(problem, method.beta, *constant)
        value = Value(QuadraticValue(problem, solution, method.sampling.times(start)), FORMS["reward-free"])
        value.fitted = True
        state = State(value, torch.optim.SGD(value.network.parameters(), lr=0.0))
        frozen = method.critic.model_copy(update={"num_steps": 0})
        once = method.model_copy(update={"num_passes": 1, "train_timesteps": None, "critic": frozen})
        x = draw_start(problem, trajectories, start, stream(seed, "start"))
        reward, generator = reward_of(problem), stream(seed, "gradient", method.estimator)
        running = running_reward_of(problem)
        batch = Batch(x, tuned, base, reward, generator, start=start, micro_batch_size=trajectories, running=running)
        next(once.gradients(batch, state))
        (coefficients,) = tuned.parameters()
        assert coefficients.grad is not None
        return -coefficients.grad * (trajectories * method.beta)
    finally:
        torch.set_default_dtype(before)
