"""Pretraining: the small models that tiltflow ships, and yours of the same kind, from an .npz file or a folder of images."""

# Mutation tests: test_pretrain.py

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from tiltflow.data import ImageData, fingerprint, load_images
from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import frechet_distance, in_batches
from tiltflow.files import check_room, filling, reason, write_text
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import Interpolant, Linear, PredictionType, expand, interior, mixture_weights
from tiltflow.flows.precision import MixedPrecision, autocast, autocast_dtype
from tiltflow.models.model import CARD, ClassifierConfig, FlowConfig, Model, load_classifier, save_model
from tiltflow.optimization import WeightAverage, finite, gradient_norm, learning_rate_factor
from tiltflow.plugins import part_of
from tiltflow.runs.lock import working_in
from tiltflow.runs.recipe import find_recipe, read_recipe_tree
from tiltflow.runs.run_folder import claim
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Settings, validate
from tiltflow.streams import new_network, stream

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")
NetworkSettings = Annotated[Any, BeforeValidator(part_of("networks"))]
Deviation = Annotated[float, Field(ge=0)]


class Optimization(Settings):
    """AdamW with a linear warm-up and a cosine decay to zero."""

    max_train_steps: Annotated[int, Field(ge=1)] = 6000
    """Optimizer steps."""
    train_batch_size: Annotated[int, Field(ge=1)] = 128
    """Images in each of them."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Of AdamW, after the warm-up."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps over which the learning rate grows from 0, linearly."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW, decoupled from the gradient; 0 for none."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """A longer gradient is shortened to this length."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Of the moving average of the weights, which is what is saved."""
    mixed_precision: MixedPrecision = "no"
    """How the network is evaluated: "bf16", "no", or "auto", which is bf16 where the hardware multiplies it."""


class FlowPretraining(Settings):
    """Regress the prediction of a generative model at a uniform time of the interpolant's own clock."""

    task: Literal["flow"] = "flow"
    """What is trained."""
    description: str = ""
    """A line for people: it is shown when the run begins."""
    network: NetworkSettings
    """What is trained: `tiltflow settings` lists the networks."""
    prediction: PredictionType = "velocity"
    """What the network says: the velocity, the noise, v = alpha noise - beta data, or the data."""
    interpolant: Annotated[Interpolant, Field(discriminator="name")] = Linear()
    """The path from noise to data."""
    training: Optimization = Optimization()
    """The optimizer and its schedule."""
    sampling: Sampling = Sampling()
    """How the model is sampled where nothing else is asked for."""
    judge: str | None = None
    """A classifier whose features and classes score the samples on the card."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The same seed, recipe, software and machine give the same result, bit for bit."""

    @property
    def is_conditional(self) -> bool:
        """Whether the network is told the class of each image."""
        return getattr(self.network, "num_classes", None) is not None


class ClassifierPretraining(Settings):
    """Cross-entropy on shifted and noisy images, with label smoothing."""

    task: Literal["classifier"] = "classifier"
    """What is trained."""
    description: str = ""
    """A line for people: it is shown when the run begins."""
    network: NetworkSettings
    """What is trained: `tiltflow settings` lists the networks."""
    training: Optimization = Optimization()
    """The optimizer and its schedule."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the label that is spread evenly over all classes."""
    noise: tuple[Deviation, Deviation] = (0.0, 0.0)
    """Gaussian noise of a standard deviation uniform between these two is added to each image. From 0 up makes a classifier
    robust. Two equal values that are large make one that does not know clean images from noisy ones: the log-odds of a blurred
    law, which change slowly from one class to the next, as a reward should."""
    max_shift: Annotated[int, Field(ge=0)] = 2
    """Images are shifted by up to this many pixels."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The same seed, recipe, software and machine give the same result, bit for bit."""


Pretraining = FlowPretraining | ClassifierPretraining


@dataclass(frozen=True)
class Progress:
    step: int
    loss: float
    seconds: float


def pretrain(recipe: Pretraining, data: ImageData, network: nn.Module) -> Iterator[Progress]:
    """Train `network` in place, one record per step. When the iterator ends, its weights are their moving average.

    Raises NonFiniteError, before the weights are touched, if the loss is not finite.
    """
    device = data.images.device
    draws = stream(recipe.seed, "noise", device=device)
    batches = _batches(len(data), recipe.training.train_batch_size, stream(recipe.seed, "order"))

    def loss_of() -> Tensor:
        index = next(batches).to(device)
        if isinstance(recipe, FlowPretraining):
            labels = _labels(data)[index] if recipe.is_conditional else None
            return flow_loss(recipe, network, data.images[index], draws, labels)
        return classifier_loss(recipe, network, data.images[index], _labels(data)[index], draws)

    torch_state = torch.random.get_rng_state()  # dropout has no generator of its own: give it a seed, then put ours back
    torch.manual_seed(stream(recipe.seed, "dropout").initial_seed())
    yield from learn([network], recipe.training, loss_of, device)
    torch.random.set_rng_state(torch_state)


def learn(
    networks: list[nn.Module], training: Optimization, loss_of: Callable[[], Tensor], device: torch.device
) -> Iterator[Progress]:
    """Train networks in place on a loss, one record per step; at the end their weights are their moving average."""
    parameters = [p for network in networks for p in network.requires_grad_(True).train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=training.weight_decay)
    average, began = WeightAverage(parameters, training.ema_decay), time.perf_counter()
    dtype = autocast_dtype(training.mixed_precision, device)
    for step in range(1, training.max_train_steps + 1):
        factor = learning_rate_factor(step, warmup=training.lr_warmup_steps, total=training.max_train_steps)
        optimizer.param_groups[0]["lr"] = training.learning_rate * factor
        with autocast(dtype, device):
            loss = loss_of()
        finite(loss, "the loss", step)
        optimizer.zero_grad()
        loss.backward()
        gradient_norm(parameters, training.max_grad_norm, step)
        optimizer.step()
        average.update()
        yield Progress(step, loss.item(), time.perf_counter() - began)
    average.store()
    for network in networks:
        network.requires_grad_(False).eval()


def read_pretraining(recipe: str, overrides: Sequence[str]) -> Pretraining:
    """A checked pretraining recipe, shipped or the user's own."""
    return pretraining_of(read_recipe_tree(find_recipe(recipe, "pretrain"), overrides), recipe)


def pretraining_of(tree: Mapping[str, Any], recipe: str) -> Pretraining:
    """The pretraining that a recipe describes, checked."""
    match tree.get("task"):
        case "flow":
            return validate(FlowPretraining, tree, recipe)
        case "classifier":
            return validate(ClassifierPretraining, tree, recipe)
        case other:
            raise InputError(f"{recipe}: task must be 'flow' or 'classifier' (got {other!r})")


def run_pretraining(
    recipe: Pretraining,
    path: Path,
    folder: Path,
    *,
    name: str,
    device: str = "cpu",
    watch: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Train on the data at `path` and write a model folder, card and scores included. Returns the scores.

    The model is written as soon as it is trained, its scores follow. Raises InputError, with nothing trained or written, if the
    folder is occupied or cannot be written to, or if data or judge do not fit.
    """
    with working_in(folder):
        claim(folder)
        data, test = (load_images(path, split) for split in SPLITS)
        for split, images in zip(SPLITS, (data, test), strict=True):
            if images.images.shape[1:] != data.images.shape[1:]:
                raise InputError(
                    f"{path}: x_{split} are {list(images.images.shape[1:])}, x_train {list(data.images.shape[1:])}"
                )
            if isinstance(recipe, ClassifierPretraining) and images.labels is None:
                raise InputError(f"{path}: has no labels of x_{split} to train a classifier on")
        event_shape = tuple(data.images.shape[1:])
        if isinstance(recipe, FlowPretraining) and recipe.judge is not None:
            check_judge(recipe.judge, event_shape)
        class_names: tuple[str, ...] = ()
        if isinstance(recipe, FlowPretraining) and recipe.is_conditional:
            class_names = data.class_names
            if len(class_names) != recipe.network.num_classes:
                raise InputError(f"network.num_classes is {recipe.network.num_classes}, {path} has {len(class_names)} classes")
        network = new_network(recipe.network, recipe.seed).to(device)
        size = sum(parameter.nbytes for parameter in network.parameters())
        check_room(folder, size, size)
        last = None
        for last in pretrain(recipe, data.to(device), network):
            watch(last)
        assert last is not None
        network = network.cpu()
        if isinstance(recipe, FlowPretraining):
            config: FlowConfig | ClassifierConfig = FlowConfig(
                network=recipe.network,
                prediction=recipe.prediction,
                interpolant=recipe.interpolant,
                event_shape=event_shape,
                class_names=class_names,
                sampling=recipe.sampling,
            )
        else:
            config = ClassifierConfig(network=recipe.network, class_names=data.class_names)
        scores: dict[str, Any] = {"training_loss": last.loss}
        about = partial(card, recipe, name, path, len(data), network, last.seconds, device)
        with filling(folder) as draft:
            save_model(draft, config, network, about(scores))
        if isinstance(recipe, FlowPretraining):
            flow = Flow(network, recipe.prediction, recipe.interpolant)
            model = Model(flow, event_shape, recipe.sampling, recipe.network, class_names)
            scores |= flow_scores(recipe, model, test)
        else:
            scores |= classifier_scores(network, test)
        write_text(folder / CARD, about(scores))
        return scores


def check_judge(name: str, event_shape: tuple[int, ...]) -> None:
    """Raises InputError if the judge cannot be had, or does not take what the model will make."""
    judge, _ = load_classifier(name)
    x = torch.zeros(2, *event_shape)
    try:
        with torch.no_grad():
            judge(x)
            cast(Callable[[Tensor], Tensor], judge.features)(x)
    except (RuntimeError, AttributeError) as error:  # torch's words for a wrong shape, and for a network without features
        raise InputError(f"judge {name}: does not take samples of shape {list(event_shape)} ({reason(error)})") from None


@torch.no_grad()
def classifier_scores(network: nn.Module, test: ImageData) -> dict[str, Any]:
    """Accuracy on the test split, clean and under Gaussian noise of standard deviation 0.3."""
    labels, noise = _labels(test), stream(0, "test noise")
    noisy = test.images + 0.3 * torch.randn(test.images.shape, generator=noise)
    return {
        key: _accuracy(network, images, labels)
        for key, images in (("test_accuracy", test.images), ("test_accuracy_noise_0.3", noisy))
    }


def _accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    hits = sum(int((network(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return hits / len(labels)


@torch.no_grad()
def flow_scores(recipe: FlowPretraining, model: Model, test: ImageData) -> dict[str, Any]:
    """With a judge: how sure it is of 1,000 samples, their classes, their Frechet distance to test images in its features."""
    if recipe.judge is None:
        return {}
    judge, config = load_classifier(recipe.judge)
    features = cast(Callable[[Tensor], Tensor], judge.features)
    scores: dict[str, Any] = {}
    for solver, sampling in (("memoryless", recipe.sampling), ("heun", Sampling(solver="heun", num_inference_steps=20))):
        x = model.sample(1000, sampling=sampling)
        probabilities, real = judge(x).softmax(1), test.images[:5000]
        scores[f"judge_confidence_{solver}"] = probabilities.amax(1).mean().item()
        scores[f"frechet_distance_{solver}"] = frechet_distance(in_batches(features, x, 500), in_batches(features, real, 500))
        seen = probabilities.argmax(1)
        if model.class_names == config.class_names:
            scores[f"label_agreement_{solver}"] = (seen == model.labels(len(x))).double().mean().item()
        counts = seen.bincount(minlength=len(config.class_names))
        scores[f"class_fractions_{solver}"] = [round(fraction, 3) for fraction in (counts / 1000).tolist()]
    scores["judge_confidence_test"] = judge(test.images[:1000]).softmax(1).amax(1).mean().item()
    scores["frechet_distance_test"] = frechet_distance(*(in_batches(features, half, 500) for half in test.images.chunk(2)))
    return scores


def card(
    recipe: Pretraining,
    name: str,
    path: Path,
    count: int,
    network: nn.Module,
    seconds: float,
    device: str,
    scores: dict[str, Any],
) -> str:
    """The model card: what it is, from which data and command, and what it scores."""
    parameters = sum(p.numel() for p in network.parameters())
    where = f"{torch.get_num_threads()} CPU threads" if device == "cpu" else device
    lines = [
        f"# {name}",
        "",
        f"{recipe.description[:1].upper()}{recipe.description[1:]}.",
        "",
        f"- data: `{path.name}` (sha256 {fingerprint(path)}..), {count:,} training images",
        f"- command: `tiltflow pretrain {name} --data {path.name} --output {name}`, seed {recipe.seed}",
        f"- training: {recipe.training.max_train_steps:,} steps of {recipe.training.train_batch_size} images, "
        f"{seconds / 60:.0f} minutes on {where}, mixed precision "
        f"'{recipe.training.mixed_precision}', torch {torch.__version__}",
        f"- network: {recipe.network.name}, {parameters:,} parameters",
        "",
        "| score | value |",
        "|---|---|",
        *(f"| {key} | {f'{value:.4g}' if isinstance(value, float) else value} |" for key, value in scores.items()),
        "",
        "Features and confidence are those of the `digits-judge` classifier; `_test` is the same measure on real test images.",
        "",
    ]
    return "\n".join(lines if isinstance(recipe, FlowPretraining) else lines[:-2])


def flow_loss(
    recipe: FlowPretraining, network: nn.Module, x1: Tensor, generator: torch.Generator, labels: Tensor | None = None
) -> Tensor:
    """Mean squared error of the network's own prediction, a x_1 + b x_0, at one uniform time per sample; given their labels
    [batch], of a class-conditional network."""
    s = interior(torch.rand(len(x1), generator=generator, device=x1.device))
    x0 = torch.randn(x1.shape, generator=generator, device=x1.device)
    c = recipe.interpolant(s.double())
    a, b = mixture_weights(recipe.prediction, c)
    x = expand(c.alpha, x1) * x1 + expand(c.beta, x1) * x0
    target = expand(a, x1) * x1 + expand(b, x1) * x0
    predicted: Tensor = network(x, recipe.interpolant.network_time(s), *(() if labels is None else (labels,)))
    return F.mse_loss(predicted, target)


def classifier_loss(
    recipe: ClassifierPretraining, network: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """Cross-entropy on augmented images."""
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


def _labels(data: ImageData) -> Tensor:
    assert data.labels is not None
    return data.labels


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices; each pass over the data is a new permutation."""
    while True:
        for index in torch.randperm(count, generator=generator).split(min(size, count)):
            if len(index) == min(size, count):
                yield index
