"""The training loop of pretraining: AdamW, a moving average of the weights, and stages that follow one another."""

# Mutation tests: test_pretrain.py

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from tiltflow.flows.precision import MixedPrecision, autocast, autocast_dtype
from tiltflow.optimization import WeightAverage, finite, gradient_norm
from tiltflow.settings import Settings
from tiltflow.streams import stream
from tiltflow.training.optimizer import learning_rate_factor

BETAS = (0.9, 0.99)


class Optimization(Settings):
    """AdamW with a linear warm-up and a cosine decay to zero."""

    max_train_steps: Annotated[int, Field(ge=1)] = 6000
    """Optimizer steps."""
    max_train_seconds: Annotated[float, Field(gt=0)] | None = None
    """Time after which training ends, and the decay of the learning rate with it, if the steps are not over before: for a
    machine that is had for so long. The result then depends on how fast it is."""
    train_batch_size: Annotated[int, Field(ge=1)] = 128
    """Samples per step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of AdamW after the warm-up."""
    lr_warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps over which the learning rate grows linearly from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW, decoupled from the gradient; 0 for none."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Norm to which a longer gradient is clipped."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the moving average of the weights, which is what is saved."""
    mixed_precision: MixedPrecision = "no"
    """Precision of the network: "bf16", "no", or "auto", which is bf16 where the hardware multiplies it."""


@dataclass(frozen=True)
class Stage:
    """Part of a training that has an optimizer of its own.

    Args:
        name: a word for it; `{name}_loss` is its last loss among the scores.
        networks: the networks that are trained.
        loss: draws a batch and returns its loss, a scalar.
    """

    name: str
    networks: tuple[nn.Module, ...]
    optimization: Optimization
    loss: Callable[[], Tensor]


@dataclass(frozen=True)
class Progress:
    """Record of one optimizer step.

    Args:
        step: number of the step, from 1, over all stages.
        samples: images drawn so far, over all stages.
        seconds: time since training began.
    """

    stage: str
    step: int
    samples: int
    loss: float
    seconds: float


def train(stages: Iterable[Stage], seed: int, stopped: Callable[[], bool] = lambda: False) -> Iterator[Progress]:
    """Train the networks of each stage in place, one record per step. A stage is asked for when the one before it has ended;
    its networks then hold the moving average of their weights, without gradients and in eval mode.

    Args:
        stopped: whether to end before the next step, as if all steps had been taken.

    Raises NonFiniteError, before the weights change, if a loss or a gradient is not finite.
    """
    began, step, samples = time.perf_counter(), 0, 0
    with torch.random.fork_rng(devices=[]):  # dropout draws from torch's global generator, which is put back at the end
        torch.manual_seed(stream(seed, "dropout").initial_seed())
        for stage in stages:
            for loss in _losses(stage, stopped):
                step, samples = step + 1, samples + stage.optimization.train_batch_size
                yield Progress(stage.name, step, samples, loss, time.perf_counter() - began)


def _losses(stage: Stage, stopped: Callable[[], bool]) -> Iterator[float]:
    """Train the networks of one stage, one loss per step."""
    settings = stage.optimization
    parameters = [p for network in stage.networks for p in network.requires_grad_(True).train().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay)
    average, device = WeightAverage(parameters, settings.ema_decay), parameters[0].device
    dtype = autocast_dtype(settings.mixed_precision, device)
    began = time.perf_counter()
    for step in range(1, settings.max_train_steps + 1):
        total = steps_in_time(settings, step, time.perf_counter() - began)
        if step > total or stopped():
            break
        factor = learning_rate_factor(step, warmup=settings.lr_warmup_steps, total=total)
        optimizer.param_groups[0]["lr"] = settings.learning_rate * factor
        with autocast(dtype, device):
            loss = stage.loss()
        finite(loss, "the loss", step)
        optimizer.zero_grad()
        loss.backward()
        gradient_norm(parameters, settings.max_grad_norm, step)
        optimizer.step()
        average.update()
        yield loss.item()
    average.store()
    for network in stage.networks:
        network.requires_grad_(False).eval()


def steps_in_time(settings: Optimization, step: int, seconds: float) -> int:
    """Optimizer steps of a training as far as can be seen before this one: as many as there is time for at the speed so far.

    Args:
        seconds: that the steps before it took.

    >>> steps_in_time(Optimization(max_train_seconds=60, max_train_steps=500), step=11, seconds=2)
    300
    >>> steps_in_time(Optimization(max_train_seconds=60), step=301, seconds=60.1) < 301
    True
    """
    if settings.max_train_seconds is None or step == 1:
        return settings.max_train_steps
    return min(settings.max_train_steps, int((step - 1) * settings.max_train_seconds / seconds))
