"""Pretraining of a classifier of images: a reward, or a judge of samples."""

# Mutation tests: test_pretrain.py

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.data import ImageData
from tiltflow.errors import InputError
from tiltflow.models.model_folder import ClassifierConfig, save_model
from tiltflow.pretraining.images import ImagePretraining, ImageTask, load_splits
from tiltflow.pretraining.recipe import Scores
from tiltflow.streams import new_network, stream

Deviation = Annotated[float, Field(ge=0)]


class ClassifierPretraining(ImagePretraining):
    """Cross-entropy on shifted and noisy images, with label smoothing."""

    ELSEWHERE: ClassVar = {
        **dict.fromkeys(("prediction", "interpolant", "sampling"), "a classifier generates no samples"),
        "judge": "a classifier is scored by its accuracy on the test split",
        "prompt_dropout": "a classifier is asked for nothing, and has no guidance",
    }

    task: Literal["classifier"] = "classifier"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the label that is spread evenly over all classes."""
    noise: tuple[Deviation, Deviation] = (0.0, 0.0)
    """Gaussian noise is added to each image, of a standard deviation uniform between these two. From 0 up makes a classifier
    robust. Two equal large values make one that cannot tell clean images from noisy ones: its log-odds are those of a blurred
    law, which change slowly from one class to the next, as a reward should."""
    max_shift: Annotated[int, Field(ge=0)] = 2
    """Pixels by which images are shifted at most."""

    def prepare(self, path: Path, device: str) -> ClassifierTask:
        data, test = load_splits(path)
        for split, images in (("train", data), ("test", test)):
            if images.labels is None:
                raise InputError(f"{path}: has no labels of x_{split} to train a classifier on")
        return ClassifierTask(self, new_network(self.network, self.seed).to(device), data.to(device), test)


RECIPE = ClassifierPretraining


class ClassifierTask(ImageTask[ClassifierPretraining]):
    """A classifier; it is scored on the test images."""

    def loss(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        assert labels is not None  # `prepare` has checked it
        return classifier_loss(self.recipe, self.network, images, labels, generator)

    def save(self, folder: Path, card: str) -> None:
        config = ClassifierConfig(network=self.recipe.network, class_names=self.train.class_names)
        save_model(folder, config, self.network, card)

    def scores(self) -> Scores:
        return classifier_scores(self.network, self.test)


def classifier_loss(
    recipe: ClassifierPretraining, network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """Cross-entropy on augmented images [batch, channels, height, width] with labels [batch]."""
    most = recipe.max_shift
    if most:
        padded = F.pad(images, (most,) * 4, mode="replicate")
        height, width = images.shape[-2:]
        shifts = torch.randint(0, 2 * most + 1, (len(images), 2), generator=generator, device=images.device).tolist()
        images = torch.stack([image[:, i : i + height, j : j + width] for image, (i, j) in zip(padded, shifts, strict=True)])
    low, high = recipe.noise
    if low or high:
        level = low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
        images = images + level * torch.randn(images.shape, generator=generator, device=images.device)
    return F.cross_entropy(network(images), labels, label_smoothing=recipe.label_smoothing)


@torch.no_grad()
def classifier_scores(network: nn.Module, test: ImageData) -> Scores:
    """Accuracy on the test split, clean and under Gaussian noise of standard deviation 0.3."""
    labels, noise = test.labels, stream(0, "test noise")
    assert labels is not None
    noisy = test.images + 0.3 * torch.randn(test.images.shape, generator=noise)
    return {
        "test_accuracy": _accuracy(network, test.images, labels),
        "test_accuracy_noise_0.3": _accuracy(network, noisy, labels),
    }


def _accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    hits = sum(int((network(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return hits / len(labels)
