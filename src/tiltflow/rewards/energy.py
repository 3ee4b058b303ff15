"""Likeness to data: minus an energy that learns, while a method trains, to tell samples from data."""

# Mutation tests: test_energy.py

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from tiltflow.data import load_images
from tiltflow.errors import InputError
from tiltflow.flows.field import VelocityField
from tiltflow.optimization import load_optimizer
from tiltflow.plugins import part_of
from tiltflow.settings import PathOrName, Settings
from tiltflow.streams import new_network

Positive = Annotated[float, Field(gt=0)]


class Energy(Settings):
    """Minus E(x), where E minimises E(data) - E(samples) + regularization (E(data)^2 + E(samples)^2) (arXiv 2407.00626).

    The reward changes with the model: there is no fixed target law, and rewards of different steps cannot be compared.
    """

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = True
    unit: ClassVar[str] = "energy"

    name: Literal["energy"] = "energy"
    data: PathOrName
    """An .npz file with x_train, or a folder of images."""
    network: Annotated[Any, BeforeValidator(part_of("networks"))] | None = None
    """Images [batch, channels, height, width] -> [batch, 1]; by default a residual classifier with one class."""
    learning_rate: Positive = 3e-4
    """Learning rate of its own Adam."""
    num_steps: Annotated[int, Field(ge=1)] = 2
    """Optimizer steps on each batch of samples."""
    regularization: Positive = 1.0
    """Weight of the penalty on large energies."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the network's first weights."""

    @property
    def description(self) -> str:
        return "how much a sample looks like data to an energy that is learned along the way; higher is better"

    def build(self, device: torch.device | str = "cpu") -> EnergyReward:
        """Raises InputError if the data cannot be read."""
        images = load_images(Path(self.data)).images
        default = {"name": "residual-classifier", "classes": 1, "image_channels": images.shape[1]}
        network = new_network(self.network or part_of("networks")(default), self.seed)
        return EnergyReward(self, network.to(device), images.to(device))


class EnergyReward:
    """See `tiltflow.rewards.LearnedReward`."""

    def __init__(self, settings: Energy, network: nn.Module, images: Tensor):
        self.settings, self.network, self.images = settings, network, images
        self.optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate, betas=(0.5, 0.99))

    def __call__(self, x: Tensor) -> Tensor:
        energy: Tensor = self.network(x)
        return -energy[:, 0]

    def state_dict(self) -> dict[str, Any]:
        """The state of the network and of its optimizer."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.network.load_state_dict(state["network"])
        load_optimizer(self.optimizer, state["optimizer"])

    def learn(self, x: Tensor, field: VelocityField, generator: torch.Generator) -> dict[str, float]:
        """Take optimizer steps on samples x [batch, *event] and as many images. Returns the loss before them, `reward_loss`.

        Raises InputError if they are of different shapes.
        """
        if x.shape[1:] != self.images.shape[1:]:
            raise InputError(f"images of shape {list(self.images.shape[1:])} in the data, but samples of {list(x.shape[1:])}")
        losses: list[float] = []
        for _ in range(self.settings.num_steps):
            which = torch.randint(len(self.images), (len(x),), generator=generator, device=generator.device)
            data, samples = self.network(self.images[which]), self.network(x.detach())
            loss = (data - samples).mean() + self.settings.regularization * (data.square() + samples.square()).mean()
            losses.append(loss.item())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return {"reward_loss": losses[0]}
