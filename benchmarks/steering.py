"""Distances to the tilt of steered samples against what they cost, on two modes under tanh x, beside a tuned model's.

python benchmarks/steering.py
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

import tiltflow
from tiltflow.evaluation.distances import distance_to_law
from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import ExactVelocity
from tiltflow.problems.two_modes import TwoModes, sampler
from tiltflow.samplers.sampling import Sampling
from tiltflow.steering import Steering
from tiltflow.streams import stream

SAMPLES, STEPS = 1000, 40


def tanh(x: Tensor) -> Tensor:
    """The reward of the problem."""
    return torch.tanh(x[:, 0])


def kinds(beta: float) -> dict[str, tuple[Steering, str]]:
    """The kinds that are compared, and the solver of each."""
    return {
        "best-of-n, n = 2": (tiltflow.BestOfN(n=2), "heun"),
        "best-of-n, n = 4": (tiltflow.BestOfN(n=4), "heun"),
        "importance-resampling, n = 2": (tiltflow.ImportanceResampling(beta=beta, n=2), "heun"),
        "importance-resampling, n = 16": (tiltflow.ImportanceResampling(beta=beta, n=16), "heun"),
        "smc": (tiltflow.Smc(beta=beta), "memoryless"),
        "smc, 16 particles": (tiltflow.Smc(beta=beta, num_particles=16), "memoryless"),
        "gradient-guidance": (tiltflow.GradientGuidance(beta=beta), "heun"),
        "gradient-guidance, damped": (tiltflow.GradientGuidance(beta=beta, curvature=1.0, std=0.5), "heun"),
    }


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    found = torch.tensor(values)
    return f"{found.mean().item():.3f} ± {found.std().item():.3f}"


def main() -> None:
    """Print a table in Markdown."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--beta", type=float, default=0.3)
    given = options.parse_args()
    problem = TwoModes()
    base, model = problem.law(), tiltflow.Model(Flow(ExactVelocity(problem.base())), event_shape=(1,))
    tilt = base.tilt(problem.reward_at(base.points) / given.beta)

    def measured(x: Tensor, seed: int) -> Any:
        return distance_to_law(x, sampler(tilt), stream(seed, "exact"), directions=stream(seed, "directions"), draws=10)

    print(f"W2 to the tilt at beta = {given.beta:g} of {SAMPLES} samples; exact mean reward", end=" ")
    print(f"{tilt.expectation(problem.reward_at):.3f}\n")
    print("| | W2 | mean reward | network evaluations a sample | rewards a sample |\n|---|---|---|---|---|")
    for name, (steering, solver) in kinds(given.beta).items():
        sampling = Sampling(solver=solver, num_inference_steps=STEPS if solver == "memoryless" else STEPS // 2)
        found = [
            tiltflow.steer(model, tanh, steering, SAMPLES, sampling=sampling, seed=seed, batch_size=SAMPLES)
            for seed in range(given.seeds)
        ]
        distances = [measured(each.samples, seed).distance for seed, each in enumerate(found)]
        rewards = [each.rewards.mean().item() for each in found]
        costs = f"{found[0].network_evaluations / SAMPLES:.0f} | {found[0].reward_evaluations / SAMPLES:.0f}"
        print(f"| {name} | {spread(distances)} | {spread(rewards)} | {costs} |", flush=True)
    exact = [sampler(tilt)(SAMPLES, stream(seed, "floor")) for seed in range(given.seeds)]
    floor = [measured(x, seed).distance for seed, x in enumerate(exact)]
    print(f"| exact samples (the floor) | {spread(floor)} | {spread([tanh(x).mean().item() for x in exact])} | | |")
    assert math.isfinite(sum(floor))


if __name__ == "__main__":
    main()
