"""Pretraining of a generative model of images, class-conditional if its network takes labels."""

# Mutation tests: test_pretrain.py

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.data import ImageData
from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import in_batches
from tiltflow.evaluation.features import frechet_distance
from tiltflow.files import reason
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import Interpolant, Linear, PredictionType, interior
from tiltflow.models.model import Model
from tiltflow.models.model_folder import load_classifier
from tiltflow.networks import ClassConditional, WithFeatures
from tiltflow.pretraining.images import ImagePretraining, ImageTask, load_splits
from tiltflow.pretraining.recipe import Scores
from tiltflow.pretraining.regression import point_and_target
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import new_network


class GenerativePretraining(ImagePretraining):
    """Regress the prediction of a generative model at a uniform time of the interpolant's own clock."""

    prediction: PredictionType = "velocity"
    """Prediction of the network: the velocity, the noise, v = alpha noise - beta data, or the data."""
    interpolant: Annotated[Interpolant, Field(discriminator="name")] = Linear()
    """The path from noise to data."""
    sampling: Sampling = Sampling()
    """Solver and grid of the saved model where nothing else is asked for."""
    judge: str | None = None
    """A classifier whose features and classes score the samples on the card."""


class FlowPretraining(GenerativePretraining):
    """A generative model of images, class-conditional if its network takes labels."""

    ELSEWHERE: ClassVar = {
        "prompt_dropout": "a network has an embedding for each class and none for no class, so labels cannot be left out;"
        " classifier-free guidance is for pipelines",
        **dict.fromkeys(
            ("autoencoder", "encoder", "decoder", "kl_weight"),
            "a flow is a network on the images themselves; for a flow of latents, task: latent-flow",
        ),
    }

    task: Literal["flow"] = "flow"

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional network; None for another."""
        network = self.network
        return network.num_classes if isinstance(network, ClassConditional) else None

    def prepare(self, path: Path, device: str) -> FlowTask:
        data, test = load_splits(path)
        if self.judge is not None:
            load_judge(self.judge, tuple(data.images.shape[1:]))
        if self.num_classes is not None and len(data.class_names) != self.num_classes:
            raise InputError(f"network.num_classes is {self.num_classes}, {path} has {len(data.class_names)} classes")
        return FlowTask(self, new_network(self.network, self.seed).to(device), data.to(device), test)


RECIPE = FlowPretraining


class FlowTask(ImageTask[FlowPretraining]):
    """A generative model; its samples are compared with the test images."""

    @property
    def model(self) -> Model:
        """The network as a model that can be sampled and saved."""
        recipe, names = self.recipe, self.train.class_names
        return Model(
            Flow(self.network, recipe.prediction, recipe.interpolant),
            tuple(self.train.images.shape[1:]),
            recipe.sampling,
            recipe.network,
            names if recipe.num_classes is not None else (),
        )

    def loss(self, images: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
        return flow_loss(self.recipe, self.network, images, generator, labels if self.recipe.num_classes is not None else None)

    def save(self, folder: Path, card: str) -> None:
        self.model.save(folder, card)

    def scores(self) -> Scores:
        return {} if self.recipe.judge is None else judged(self.model, self.recipe.judge, self.test)

    def remarks(self) -> list[str]:
        return about_judge(self.recipe.judge)


def flow_loss(
    recipe: GenerativePretraining, network: nn.Module, x1: Tensor, generator: torch.Generator, labels: Tensor | None = None
) -> Tensor:
    """Mean squared error of the network's own prediction at one uniform time per sample.

    Args:
        x1: data [batch, *event].
        labels: [batch] int64, of a class-conditional network.
    """
    s = interior(torch.rand(len(x1), generator=generator, device=x1.device))
    x0 = torch.randn(x1.shape, generator=generator, device=x1.device)
    x, target = point_and_target(recipe.interpolant(s.double()), recipe.prediction, x0, x1)
    predicted: Tensor = network(x, recipe.interpolant.network_time(s), *(() if labels is None else (labels,)))
    return F.mse_loss(predicted, target)


@dataclass(frozen=True)
class Judge:
    """Classifier that scores samples: its logits, its features and the names of its classes."""

    logits: Callable[[Tensor], Tensor]
    features: Callable[[Tensor], Tensor]
    class_names: tuple[str, ...]


def load_judge(name: str, event_shape: tuple[int, ...]) -> Judge:
    """Load a classifier. Raises InputError if there is none, or it does not take samples of this shape."""
    network, config = load_classifier(name)
    if not isinstance(network, WithFeatures):
        raise InputError(f"judge {name}: has no features")
    x = torch.zeros(2, *event_shape)
    try:
        with torch.no_grad():
            network(x)
            network.features(x)
    except RuntimeError as error:  # torch's word for a wrong shape
        raise InputError(f"judge {name}: does not take samples of shape {list(event_shape)} ({reason(error)})") from None
    return Judge(network, network.features, config.class_names)


def about_judge(name: str | None) -> list[str]:
    """What the card says of the judge, if there is one."""
    measured = f"Features and confidence are those of the `{name}` classifier"
    return [] if name is None else [f"{measured}; `_test` is the same measure on real test images."]


@torch.no_grad()
def judged(model: Model, name: str, test: ImageData) -> Scores:
    """Compare 1,000 samples of two solvers with test images: confidence of the judge, classes that it sees, and the Fréchet
    distance in its features."""
    judge, scores, images = load_judge(name, model.sample_shape), Scores(), test.images
    for solver, sampling in (("memoryless", model.sampling), ("heun", Sampling(solver="heun", num_inference_steps=20))):
        x = model.sample(1000, sampling=sampling)
        probabilities = judge.logits(x).softmax(1)
        scores[f"judge_confidence_{solver}"] = probabilities.amax(1).mean().item()
        scores[f"frechet_distance_{solver}"] = frechet_distance(
            *(in_batches(judge.features, y, 500) for y in (x, images[:5000]))
        )
        seen = probabilities.argmax(1)
        if model.class_names == judge.class_names and (asked := model.labels(len(x))) is not None:
            scores[f"label_agreement_{solver}"] = (seen == asked).double().mean().item()
        counts = seen.bincount(minlength=len(judge.class_names))
        scores[f"class_fractions_{solver}"] = [round(fraction, 3) for fraction in (counts / 1000).tolist()]
    scores["judge_confidence_test"] = judge.logits(images[:1000]).softmax(1).amax(1).mean().item()
    scores["frechet_distance_test"] = frechet_distance(*(in_batches(judge.features, half, 500) for half in images.chunk(2)))
    return scores
