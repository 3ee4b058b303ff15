"""What the tasks on images have in common: a network, a training and a test split, and the batches that are drawn."""

# Mutation tests: test_pretrain.py

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from tiltflow.data import ImageData, load_images
from tiltflow.errors import InputError
from tiltflow.models.model_folder import NetworkSettings
from tiltflow.pretraining.loop import Stage
from tiltflow.pretraining.recipe import Pretraining
from tiltflow.streams import stream


class ImagePretraining(Pretraining):
    """Recipe for one network on images."""

    network: NetworkSettings
    """The network that is trained: `tiltflow settings` lists the networks."""


R = TypeVar("R", bound=ImagePretraining)


@dataclass(frozen=True)
class ImageTask(Generic[R]):
    """A network, the images that it is trained on, and those that it is measured on."""

    recipe: R
    network: nn.Module
    train: ImageData
    test: ImageData

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {self.recipe.network.name: self.network}

    @abstractmethod
    def loss(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        """Loss of a batch of images [batch, channels, height, width] with labels [batch], None if the data have none."""

    def stages(self) -> Iterator[Stage]:
        recipe, images, labels = self.recipe, self.train.images, self.train.labels
        generator = stream(recipe.seed, "noise", device=images.device)
        order = batches(len(images), recipe.training.train_batch_size, stream(recipe.seed, "order"))

        def loss() -> Tensor:
            index = next(order).to(images.device)
            return self.loss(images[index], None if labels is None else labels[index], generator)

        yield Stage("training", (self.network,), recipe.training, loss)

    def data(self) -> str:
        return f"{len(self.train):,} training images"

    def remarks(self) -> list[str]:
        return []


def load_splits(path: Path) -> tuple[ImageData, ImageData]:
    """Read the training and the test split. Raises InputError if one is missing or their images differ in shape."""
    train, test = load_images(path, "train"), load_images(path, "test")
    shapes = [list(split.images.shape[1:]) for split in (test, train)]
    if shapes[0] != shapes[1]:
        raise InputError(f"{path}: x_test are {shapes[0]}, x_train {shapes[1]}")
    return train, test


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Draw batches of indices [size] without end; each pass over the data is a new permutation."""
    while True:
        for index in torch.randperm(count, generator=generator).split(min(size, count)):
            if len(index) == min(size, count):
                yield index
