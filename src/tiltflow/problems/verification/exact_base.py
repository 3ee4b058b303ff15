"""Settings that problems with a Gaussian mixture as base share: its exact velocity field, and a perceptron to correct it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.flows.flow import Flow
from tiltflow.laws.gaussian_mixture import CorrectedVelocity, ExactVelocity, GaussianMixture
from tiltflow.networks.mlp import Mlp
from tiltflow.problems import Defaults, Tree
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Settings
from tiltflow.streams import new_network

Count = Annotated[int, Field(ge=1)]

# What suits a few dimensions; the methods' own defaults suit large networks.
FEW_DIMENSIONS: dict[str, Tree] = {
    "score-as-action": {"critic": {"train_batch_size": 128}},
    "orw-cfm-w2": {"regression_batch_size": 1024},
    "path-reweighted": {
        "first": {"name": "adjoint-matching", "bootstrap": 1.0},
        "first_steps": 200,
        "path_steps": 100,
        "regression_batch_size": 1024,
    },
}
LEARNING_RATES = {"adjoint-matching": 5e-3, "score-as-action": 5e-3, "orw-cfm-w2": 3e-3, "path-reweighted": 1e-2}


class ExactBase(Settings):
    """Part of the settings of every problem whose base is a Gaussian mixture."""

    name: str
    hidden: Count = 128
    """Width of the learned correction to the exact velocity, a perceptron."""
    layers: Count = 3
    """Its number of layers."""
    sampling: Sampling = Sampling()
    """How the tuned flow is sampled for the distances."""

    usual_method: ClassVar[str] = "adjoint-matching"
    letters: ClassVar[Mapping[str, Sequence[str]]] = {}

    @abstractmethod
    def base(self) -> GaussianMixture:
        """The law of the base."""

    @classmethod
    def defaults(cls, method: str) -> Defaults:
        """See `tiltflow.problems.Problem`."""
        optimizer: Tree = {"learning_rate": LEARNING_RATES[method]} if method in LEARNING_RATES else {}
        run: Tree = {}
        if method == "path-reweighted":  # many short steps, whose gradients are of another size than those of its first method
            optimizer, run = {**optimizer, "adam_beta2": 0.95}, {"iterations": 2200}
        return Defaults(tuning=FEW_DIMENSIONS.get(method, {}), run=run, optimizer=optimizer)

    def base_flow(self) -> Flow:
        """The exact velocity field of the base."""
        return Flow(ExactVelocity(self.base()))

    def tuned_flow(self, seed: int) -> Flow:
        """The base's field plus a perceptron, zero at the start."""
        law = self.base()
        correction = new_network(Mlp(dimension=law.means.shape[1], hidden=self.hidden, layers=self.layers), seed)
        return Flow(CorrectedVelocity(ExactVelocity(law), correction))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise: [count, dimension]."""
        return torch.randn(count, self.base().means.shape[1], generator=generator)
