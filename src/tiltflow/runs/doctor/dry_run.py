"""An iteration of a training without numbers: the training loop itself, on tensors that have shapes and no memory.

Whatever the loop keeps is counted where it keeps it: trajectories, conditions, gradients, moments of the optimizer, averages of
weights. A network, a decoder and a reward are called once for each kind of call; after that only their memory is counted.
"""

# Mutation tests: none: forecasts

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from tiltflow.conditions import Item
from tiltflow.flows.adapter import AdapterOff, is_off
from tiltflow.flows.flow import Flow
from tiltflow.models.protocol import GenerativeModel
from tiltflow.rewards import Reward
from tiltflow.runs.doctor.shapes import Cost, Counter, Peak, Replayed, Shapes, alone, shaped
from tiltflow.samplers.stored import Storage, Stored
from tiltflow.training.draw import batches
from tiltflow.training.method import Method
from tiltflow.training.settings import Training
from tiltflow.training.trainer import train

ENOUGH = 3
"""Micro-batches from which on more of them need more of what is kept for each, and nothing else."""

FUNCTIONS = ("network", "decoder", "reward")
"""What is called once for each kind of call."""


@dataclass(frozen=True)
class Subject:
    """What a training needs of a recipe, its weights without memory.

    Args:
        tuned, base: velocity fields, whose weights have no memory; the same network, if it has an adapter.
        model: draws noise and conditions, and decodes.
        reward: of samples.
    """

    tuned: Flow
    base: Flow | AdapterOff
    model: GenerativeModel
    reward: Reward
    items: Sequence[Item]
    method: Method
    training: Training
    known: Mapping[str, dict[Any, Cost]] = field(default_factory=lambda: {name: {} for name in FUNCTIONS})
    """What calls of its functions need, by their names."""
    measured_reward: Callable[[Tensor, bool], Cost] | None = None
    """What the reward needs, with a gradient or without, if it cannot be called on samples without numbers."""


def peaks(subject: Subject) -> dict[str, Peak]:
    """The largest memory of each phase of an iteration beside the weights. After the first few micro-batches each one adds the
    same, so that no more are run."""
    training = subject.training
    size = training.samples_per_step
    part = min(training.micro_batch_size or size, size)
    count = math.ceil(size / part)
    if count <= ENOUGH:
        return _run(subject, size)
    fewer, more = (_run(subject, part * several) for several in (ENOUGH - 1, ENOUGH))
    names = {name: {*fewer[name].parts, *more[name].parts} for name in more}
    return {
        name: Peak({key: _extended(fewer[name].parts.get(key, 0), more[name].parts.get(key, 0), count) for key in keys})
        for name, keys in names.items()
    }


def _extended(fewer: float, more: float, count: int) -> float:
    """Bytes of `count` micro-batches, where one more adds what the last one added."""
    return more + (count - ENOUGH) * max(more - fewer, 0)


def _run(subject: Subject, size: int) -> dict[str, Peak]:
    """The peaks of an iteration on so many samples."""
    training, method = subject.training, subject.method
    with Shapes(), Counter() as memory:
        tuned, base = (_replayed(each, memory, subject.known["network"]) for each in (subject.tuned, subject.base))
        if isinstance(base, AdapterOff):
            base = AdapterOff(cast(Flow, tuned))
        model = without_memory(subject.model, memory, subject.known["decoder"])
        reward = Replayed(
            subject.reward, memory, "reward", known=subject.known["reward"], numbers=True, otherwise=subject.measured_reward
        )
        sizes = {"train_batch_size": size, "decode_batch_size": training.decode_batch_size or training.micro_batch_size}
        if training.prompts_per_step is not None:
            sizes |= {"prompts_per_step": size, "num_generations": 1}
        draw = batches(model, subject.items, reward, method, training.model_copy(update=sizes))
        loop = train(
            cast(Flow, tuned),
            base,
            method,
            reward,
            draw,
            max_train_steps=training.max_train_steps,
            start=subject.model.grid,
            ema_decay=training.ema_decay,
            micro_batch_size=training.micro_batch_size,
            storage=Elsewhere(training.storage.dtype) if training.trajectory_device else training.storage,
            adam=cast(Any, partial(Moments, memory, torch.uint8 if training.use_8bit_adam else None)),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as that all rewards are the same
            for _ in range(min(method.needs.passes, training.max_train_steps)):
                next(loop)
        loop.close()
        for parameter in subject.tuned.parameters():
            parameter.grad = None
    found: dict[str, Peak] = memory.peaks
    return found


def _replayed(flow: Flow | AdapterOff, memory: Counter, known: dict[Any, Cost]) -> Flow | AdapterOff:
    """A velocity field whose network is called once for each kind of call."""
    if isinstance(flow, AdapterOff):
        return flow
    network = cast(nn.Module, flow.network)
    replayed = copy.copy(network)  # of the same weights
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    vars(replayed)["forward"] = Replayed(network.forward, memory, "network", lambda: [] if is_off(replayed) else trained, known)
    return replace(flow, network=replayed)


class Elsewhere(Storage):
    """Trajectories on the CPU, which need nothing of the device."""

    def new(self, count: int, like: Tensor) -> Stored:
        """Make room for so many steps."""
        with _disable_current_modes():
            return super().new(count, like)


class Moments:
    """The memory of AdamW: two numbers of each parameter, of its dtype or another. The step itself needs none: it is fused."""

    def __init__(self, memory: Counter, dtype: torch.dtype | None, parameters: Iterable[Tensor], lr: float, **options: Any):
        self.parameters = list(parameters)
        self.param_groups = [{"lr": lr}]
        size = sum(2 * p.numel() * (dtype or p.dtype).itemsize for p in self.parameters)
        self.moments = memory.keep(size, "optimizer")

    def step(self) -> None:
        """Change nothing."""

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


def without_memory(model: GenerativeModel, memory: Counter, known: dict[Any, Cost]) -> GenerativeModel:
    """The model with noise and conditions that have no memory, and a decoder that is called once for each kind of call."""
    kind, view = type(model), copy.copy(model)
    decoder = Replayed(model.decode, memory, "decoder", known=known)

    def noise(self: Any, items: Sequence[Item], generator: torch.Generator, t: Tensor) -> Tensor:
        return shaped((len(items), *model.event_shape))

    def conditions(self: Any, items: Sequence[Item]) -> Any:
        with alone():
            found = model.conditions(items[:1])
        return _repeated(found, len(items))

    def decode(self: Any, x: Tensor, *, batch_size: int = 4) -> Tensor:
        return decoder(x, batch_size=batch_size)

    changed = type(kind.__name__, (kind,), {"noise": noise, "conditions": conditions, "decode": decode})
    object.__setattr__(view, "__class__", changed)
    return view


def _repeated(tree: Any, count: int) -> Any:
    """Nested tensors [1, ..], so many times, without memory."""
    return tree_map_only(Tensor, lambda part: shaped((count, *part.shape[1:]), part.dtype), tree)
