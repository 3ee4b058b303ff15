r"""The working temperature of a run, calibrated on the mean reward.

With few steps, few samples or a small network, a tuned flow ends short of its target: the control is the projection of the
optimal one on what the network can tell apart, and its samples have a lower reward than p*(x) ~ p_base(x) exp(r(x) / beta)
asks for. How much lower is known, as the mean reward of the target follows from importance weights of base samples. So run
at beta / gain and raise the gain while the mean reward is too low, lower it while it is too high:

    log gain <- log gain + RATE (E_target[r] - mean reward of this batch) / beta,      1 / LIMIT <= gain <= LIMIT.

A flow that samples the target exactly has its mean reward, and would be left at gain = 1. What falls short, be it a network or
the best control of a chain of few steps (1.08 at 40 steps, 1.23 at 15, on two modes: `tiltflow.laws.chain_optimum`), is moved
to the tilt whose mean reward is right. It cannot repair more than the mean.
"""

# Mutation tests: test_calibration.py

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.field import VelocityField
from tiltflow.rewards import NonFiniteRewards, Reward
from tiltflow.rewards.functions.checked import evaluate, shared
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.batch import Drawn

RATE, LIMIT = 0.1, 3.0
NEAR = 0.95
"""A gain beyond this fraction of its limit counts as at the limit: the noise of the batches keeps it from resting there."""


class Calibration:
    """Integral control of the gain."""

    def __init__(self, target_reward: float, beta: float):
        self.target_reward, self.beta, self.log_gain = target_reward, beta, 0.0

    def state_dict(self) -> dict[str, float]:
        """The state that `load_state_dict` takes."""
        return {"target_reward": self.target_reward, "log_gain": self.log_gain}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Resume from a state."""
        self.target_reward, self.log_gain = state["target_reward"], state["log_gain"]

    @property
    def at_limit(self) -> bool:
        """True where the limit holds the gain back: the mean reward is then not the target's."""
        return gain_at_limit(math.exp(self.log_gain))

    @property
    def working_beta(self) -> float:
        """The temperature to run at, in units of reward."""
        return self.beta / math.exp(self.log_gain)

    def update(self, measured: Mapping[str, float], step: int) -> None:
        """Adapt the gain to the mean reward of a batch drawn at the working temperature."""
        most = math.log(LIMIT)
        self.log_gain += RATE * (self.target_reward - measured["reward"]) / self.beta
        self.log_gain = min(max(self.log_gain, -most), most)


def gain_at_limit(gain: float) -> bool:
    """True where the gain beta / working beta is at LIMIT or at 1 / LIMIT.

    >>> gain_at_limit(2.97), gain_at_limit(1 / 2.97), gain_at_limit(2.5)
    (True, True, False)
    """
    return max(gain, 1 / gain) >= NEAR * LIMIT


@torch.no_grad()
def target_reward(
    base: VelocityField,
    reward: Reward,
    beta: float,
    draw: Callable[[torch.Generator], Tensor | Drawn],
    sampling: Sampling,
    num_samples: int,
    *,
    seed: int = 0,
    start: Start = 0.0,
    device: torch.device | str = "cpu",
    non_finite: NonFiniteRewards = "error",
) -> Estimate:
    """E[r] under p_base(x) exp(r(x) / beta) and its standard error, from base samples.

    Args:
        draw: starting points [batch, *event] at time `start`, from a generator; or a whole `Drawn`, whose guidance is that of
            the samples.
        num_samples: at least this many; a whole number of batches is drawn.
        non_finite: `drop` leaves out samples whose reward is NaN or infinite.

    Raises InputError if too few of them carry the weight of the target law for an estimate; see `ImportanceWeights.unknown`.
    """
    rewards: list[Tensor] = []
    while sum(map(len, rewards)) < num_samples:
        generator = stream(seed, "calibration", len(rewards), device=device)
        drawn = draw(generator)
        batch = drawn if isinstance(drawn, Drawn) else Drawn(drawn)
        bound = batch.bind(base)
        acting = batch.guide(bound) if batch.guide else bound
        x = sample(in_chunks(acting), batch.x, sampling, generator, start=start)
        rewards.append(evaluate(shared(batch.reward or reward), x, non_finite).cpu())
    r = torch.cat(rewards)
    r = r[r.isfinite()]
    weights = ImportanceWeights.from_rewards(r, beta)
    if (why := weights.unknown()) is not None:
        raise InputError(f"calibration: {why} Raise method.beta or training.calibration_samples, or set the latter to 0")
    mean, error = weights.mean(r)
    return Estimate(mean.item(), error.item())
