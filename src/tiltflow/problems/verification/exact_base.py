"""Settings that problems with a Gaussian mixture as base share: its exact velocity field, and a network that corrects it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation import achieved_tilt
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.evaluation.log_ratio import END
from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import ExactVelocity, GaussianMixture
from tiltflow.laws.target import TILTED
from tiltflow.problems import Check, Defaults, Exact, Trained, Tree
from tiltflow.problems.verification.tuned_mixture import TunedMixture
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Settings
from tiltflow.streams import stream
from tiltflow.training.method import Method

Count = Annotated[int, Field(ge=1)]

# What suits a few dimensions; the methods' own defaults suit large networks.
FEW_DIMENSIONS: dict[str, Tree] = {
    "score-as-action": {"critic": {"train_batch_size": 128}},
    # the published ranges are of the sums over the pixels of a picture
    "ddpo": {"clip_range": 0.2},
    "dpok": {"clip_range": 0.2},
    "flow-grpo": {"clip_range": 0.2},
    "orw-cfm-w2": {"regression_batch_size": 1024},
    "path-reweighted": {"regression_batch_size": 1024, "path_steps": 40},
    # of very many samples: fewer rounds, so that fewer errors add up; none at all where the base's samples suffice
    "tilt-matching": {
        "target_effective_sample_size": 0.25,
        "proposal": "auto",
        "anchor_share": "least-relative-noise",  # modes must have their shares, be they small
    },
    "vgg-flow": {"beta": 1.0, "value_learning_rate": 3e-3},
    # as published it has no law; so it has one, on two modes
    "diffusion-nft": {"advantages": "centered", "beta": 2.5},
}
LEARNING_RATES = {
    "adjoint-matching": 5e-3,
    "score-as-action": 5e-3,
    "ddpo": 5e-3,
    "dpok": 5e-3,
    "flow-grpo": 5e-3,
    "orw-cfm-w2": 3e-3,
    "path-reweighted": 1e-2,
    "tilt-matching": 5e-3,
    "endpoint-adjoint-matching": 5e-3,
    "deterministic-adjoint-matching": 5e-3,
    # nothing holds them at a law: they are soon past it
    "draft": 1e-4,
    "refl": 1e-4,
}
LEARNING_RATE = 5e-3
"""Of the other methods."""
# Tilt matching learns in rounds, each from many samples, and so do RWR and RAFT; others in many short ones.
LONG: Tree = {"num_passes": 300, "regression_batch_size": 2048, "num_inference_steps": 15}
SHORT: Tree = {"num_passes": 8, "regression_batch_size": 1024, "neighbours": 256, "num_inference_steps": 15}
MANY: Tree = {"iterations": 800, "train_batch_size": 2048, "ema_decay": 0.97}
ROUNDS: dict[str, Tree] = {
    "diffusion-dpo": {"num_passes": 4, "num_draws": 8, "num_inference_steps": 15},
    "tilt-matching": LONG,
    "rwr": {**LONG, "neighbours": 256},
    "raft": {**LONG, "neighbours": 256},
    **dict.fromkeys(("ram", "awm", "adrpo", "diffusion-nft"), SHORT),
}
RUNS: dict[str, Tree] = {
    "vgg-flow": {"iterations": 400, "train_batch_size": 256},
    "diffusion-dpo": {"iterations": 1000, "train_batch_size": 512, "ema_decay": 0.97},
    **dict.fromkeys(("ram", "awm", "adrpo", "diffusion-nft"), MANY),
    "rwr": {"iterations": 1200, "train_batch_size": 32_768},
    "raft": {"iterations": 600, "train_batch_size": 32_768},
    "path-reweighted": {"iterations": 2200},
    "tilt-matching": {"iterations": 2400, "train_batch_size": 32_768},
}

MOST = 2_000
"""Samples for the achieved tilt."""


class ExactBase(Settings):
    """Part of the settings of every problem whose base is a Gaussian mixture."""

    name: str
    hidden: Count = 128
    """Width of the learned correction to the exact velocity, a perceptron that sees what the base computes on its way."""
    layers: Count = 3
    """Its number of layers."""
    sampling: Sampling = Sampling()
    """How the tuned flow is sampled for the distances."""

    usual_method: ClassVar[str] = "adjoint-matching"
    law_in_words: ClassVar[str] = TILTED
    groups: ClassVar[int] = 1
    letters: ClassVar[Mapping[str, Sequence[str]]] = {}

    @abstractmethod
    def base(self) -> GaussianMixture:
        """The law of the base."""

    @abstractmethod
    def reward(self) -> Callable[[Tensor], Tensor]:
        """A function of samples [batch, dimension] -> [batch]."""

    def base_sampler(self) -> Exact:
        """See `tiltflow.problems.Comparable`."""
        return self.base().sample

    def admit(self, method: Method) -> None:
        """Any method."""

    def tilted_sampler(self, beta: float) -> Exact:
        """(count, generator) -> exact samples [count, dimension] of p_base(x) exp(r(x) / beta). Raises InputError where the
        problem is of another law."""
        raise InputError(f"problem {self.name!r} is not of p_base(x) exp(r(x) / beta), and has no reward to compare methods by")

    @classmethod
    def defaults(cls, method: str) -> Defaults:
        """See `tiltflow.problems.Problem`."""
        optimizer: Tree = {"learning_rate": LEARNING_RATES.get(method, LEARNING_RATE)}
        if method == "path-reweighted":  # each round changes the weights, and with them the size of the gradients
            optimizer = {**optimizer, "adam_beta2": 0.95}
        rounds, run = ROUNDS.get(method, {}), RUNS.get(method, {})
        return Defaults(tuning=FEW_DIMENSIONS.get(method, {}), method=rounds, run=run, optimizer=optimizer)

    def base_flow(self) -> Flow:
        """The exact velocity field of the base."""
        return Flow(ExactVelocity(self.base()))

    def tuned_flow(self, seed: int) -> Flow:
        """The base's field with a learned correction, zero at the start."""
        return Flow(TunedMixture(self.base(), self.hidden, self.layers, seed))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise: [count, dimension]."""
        return torch.randn(count, self.base().means.shape[1], generator=generator)


def tilt_reached(
    trained: Trained[Any],
    x: Tensor,
    x_base: Tensor,
    sampling: Sampling,
    reward: Callable[[Tensor], Tensor],
    log_tilt: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """The achieved tilt, and the effective sample size: that of the method's last round, or else of base samples that are
    weighted toward the target law.

    Args:
        x, x_base: samples of the tuned model and of the base.
        sampling: how they were drawn.
        log_tilt: rewards -> log density of the target law over the base's.
    """
    some, of_round = x[:MOST], trained.record.metrics.get("effective_sample_size")
    times = sampling.times(trained.base.noise_time)
    found = achieved_tilt.measure(
        trained.tuned,
        trained.base,
        some,
        log_tilt(reward(some)),
        stream(trained.seed, "achieved tilt"),
        start=times[0].item(),
        end=min(END, times[-2].item()),
    )
    weights = ImportanceWeights.from_log_tilt(log_tilt(reward(x_base)))
    of_base, entries = weights.effective_sample_size, dict.fromkeys(achieved_tilt.KEYS) if found is None else found.entries()
    rounds, unknown = "inverse_temperature" in trained.record.metrics, weights.unknown() is not None
    return {
        **entries,
        "limits": achieved_tilt.far_in_words(entries, rounds=rounds) if unknown else [],
        "effective_sample_size": of_base if of_round is None else of_round,
        "effective_sample_size_of": f"{len(x_base)} base samples" if of_round is None else "the last round",
    }


def tilt_rows(found: Mapping[str, Any]) -> dict[str, Check | str]:
    """What `tilt_reached` found, as rows of a table."""
    slope, r2 = found["achieved_tilt"], found["achieved_tilt_r2"]
    size = {"effective sample size": f"{found['effective_sample_size']:.0f}, {found['effective_sample_size_of']}"}
    if slope is None:
        return {**size}
    note = "" if r2 is None else f"R² {Check(r2, found['achieved_tilt_r2_error']).estimate}"
    return {
        "achieved tilt": Check(slope, found["achieved_tilt_error"], theory=1.0, note=note),
        "KL to the target by it": Check(found["kl_to_target"], found["kl_to_target_error"], theory=0.0),
        **size,
        **({"limit": " ".join(found["limits"])} if found["limits"] else {}),
    }
