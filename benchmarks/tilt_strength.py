"""What a strength of the tilt does: the mean reward of a run at strengths s, beside that of the law at beta / s.

    python benchmarks/tilt_strength.py runs/even

The second is of samples of the base with the weights exp(s r / beta). `as` is the strength whose law has the mean reward of the
samples: s itself, if a strength were another temperature.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltflow.models.strength import at_strength
from tiltflow.runs.prepare import build_reward
from tiltflow.runs.run import read_run
from tiltflow.runs.strength import load_both

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def weighted(rewards: Tensor, strength: float, beta: float) -> tuple[float, float]:
    """Mean and standard error of the rewards under the law at beta / strength."""
    weights = torch.softmax(strength * rewards / beta, 0)
    mean = weights @ rewards
    return mean.item(), (weights * (rewards - mean)).square().sum().sqrt().item()


def strength_of(mean: float, rewards: Tensor, beta: float) -> float:
    """The strength of the law that has this mean reward, by bisection; the mean rises with it."""
    low, high = 0.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if weighted(rewards, middle, beta)[0] < mean else (low, middle)
    return low


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of a network with a reward of samples")
    parser.add_argument("--num-samples", type=int, default=2000, help="at each strength; of the base four times as many")
    asked = parser.parse_args()
    recipe = read_run(asked.run)
    reward = build_reward(recipe.reward, recipe.method, "cpu")
    beta = recipe.method.target(recipe.training.max_train_steps).beta
    if beta is None:
        raise SystemExit(f"{asked.run}: the law of {recipe.method.name} has no temperature")
    base, tuned = load_both(asked.run)

    def rewards(model: Any, count: int, seed: int) -> Tensor:
        return torch.cat([reward(x).double() for x in model.sample(count, seed=seed).split(500)])

    of_base = rewards(base, 4 * asked.num_samples, 1)
    print(f"{'s':>5} {'mean reward':>18} {'at beta / s':>18} {'as':>6}")
    for strength in STRENGTHS:
        drawn = rewards(at_strength(base, tuned, strength), asked.num_samples, 0)
        error, (mean, mean_error) = drawn.std() / len(drawn) ** 0.5, weighted(of_base, strength, beta)
        own = strength_of(drawn.mean().item(), of_base, beta)
        print(f"{strength:5.2f} {drawn.mean():9.3f} ± {error:.3f}  {mean:9.3f} ± {mean_error:.3f}  {own:6.2f}", flush=True)


if __name__ == "__main__":
    main()
