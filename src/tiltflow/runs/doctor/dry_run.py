"""Iterations of a training without numbers: the training loop itself, on tensors that have shapes and no memory.

Whatever the loop keeps is counted where it keeps it: trajectories, conditions, gradients, moments of the optimizer, averages of
weights. A network, a decoder and a reward are called once for each kind of call; after that only their memory is counted.
"""

# Mutation tests: none: forecasts

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from tiltflow.conditions import Item
from tiltflow.flows.adapter import AdapterOff, has_adapter, is_off
from tiltflow.flows.field import VelocityField
from tiltflow.flows.flow import Flow
from tiltflow.models.protocol import GenerativeModel
from tiltflow.offload import Offload, offloaded
from tiltflow.rewards import LearnedReward, Reward
from tiltflow.runs.doctor.blocks import shortened
from tiltflow.runs.doctor.shapes import Cost, Counter, Peak, Replayed, Shapes, alone, shaped
from tiltflow.samplers.stored import Storage, Stored
from tiltflow.training.batch import Drawn
from tiltflow.training.draw import batches
from tiltflow.training.method import Method
from tiltflow.training.settings import Training
from tiltflow.training.trainer import BatchEnd, train

ENOUGH = 3
"""Micro-batches, and iterations, from which on more of them need more of what is kept for each, and nothing else."""

BETWEEN = "between"
"""Beside the phases of an iteration: what it leaves to the next."""

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
    makes_room: bool = False
    """Whether the frozen weights of the network are elsewhere while samples are scored."""
    learner: Callable[[], LearnedReward] | None = None
    """Makes a copy of the reward that has learned nothing, its tensors without memory, if it is one that learns."""
    measured_reward: Callable[[Tensor, bool], Cost] | None = None
    """What the reward needs, with a gradient or without, if it cannot be called on samples without numbers."""


def peaks(subject: Subject) -> dict[str, Peak]:
    """The largest memory of each phase of an iteration beside the weights, when earlier ones have left all that they leave.
    After the first few micro-batches each one adds the same, so that no more are run; nor are more iterations, where a method
    keeps the samples of many."""
    training, needs = subject.training, subject.method.needs
    size = training.samples_per_step
    part = min(training.micro_batch_size or size, size)
    count = math.ceil(size / part)
    several = min(max(2, needs.batches_kept), math.ceil(training.max_train_steps / needs.passes))
    if count <= ENOUGH:
        return _after(several, _run(subject, size, several))
    fewer, more = (_after(several, _run(subject, part * some, several)) for some in (ENOUGH - 1, ENOUGH))
    return extended(fewer, more, count)


def _after(count: int, iterations: Sequence[dict[str, Peak]]) -> dict[str, Peak]:
    """The peaks of iteration number `count`, of those of the first ones."""
    return iterations[-1] if len(iterations) in (1, count) else extended(iterations[-2], iterations[-1], count)


def extended(fewer: Mapping[str, Peak], more: Mapping[str, Peak], count: int) -> dict[str, Peak]:
    """The peaks of `count` of what `more` is `ENOUGH` of, and `fewer` one less: each adds what the last one added."""

    def bytes_of(name: str, part: str) -> float:
        before = fewer[name].parts.get(part, 0) if name in fewer else 0
        return more[name].parts.get(part, 0) + (count - ENOUGH) * max(more[name].parts.get(part, 0) - before, 0)

    parts = {name: {*more[name].parts, *(fewer[name].parts if name in fewer else ())} for name in more}
    return {name: Peak({part: bytes_of(name, part) for part in those}) for name, those in parts.items()}


class _Enough(Exception):
    """No further iteration is needed."""


def _run(subject: Subject, size: int, most: int) -> list[dict[str, Peak]]:
    """The peaks of the first iterations on so many samples, `most` and `ENOUGH` at most: one, if it leaves nothing."""
    training, method = subject.training, subject.method
    found = list[dict[str, Peak]]()
    learner = None if subject.learner is None else subject.learner()  # its tensors are there: counted with the weights
    with Shapes(), Counter() as memory:
        parts = parts_without_memory(subject, memory)
        reward = _reward(subject, memory, learner)
        sizes = {"train_batch_size": size, "decode_batch_size": training.decode_batch_size or training.micro_batch_size}
        if training.prompts_per_step is not None:
            sizes |= {"prompts_per_step": size, "num_generations": 1}
        draw = batches(parts.of_flow(parts.base), subject.items, reward, method, training.model_copy(update=sizes))
        alive = list[int]()

        def begun(generator: torch.Generator) -> Drawn:
            if not alive:  # the optimizer is there
                alive.append(memory.now)
            return draw.at(0)(generator)

        def ended(end: BatchEnd) -> None:
            found.append({**memory.peaks, BETWEEN: Peak({"rest": memory.now - sum(memory.kept.values()), **memory.kept})})
            memory.peaks = {}
            if len(found) == min(most, ENOUGH) or memory.now <= alive[0]:
                raise _Enough

        loop = train(
            parts.tuned,
            parts.base,
            method,
            reward,
            begun,
            max_train_steps=training.max_train_steps,
            start=subject.model.grid,
            ema_decay=training.ema_decay,
            micro_batch_size=training.micro_batch_size,
            storage=Elsewhere(training.storage.dtype) if training.trajectory_device else training.storage,
            adam=cast(Any, partial(Moments, memory, torch.uint8 if training.use_8bit_adam else None)),
            on_batch_end=ended,
        )
        away = Offload((), None, torch.device("cpu"), nn.Module()) if subject.makes_room else None
        with warnings.catch_warnings(), suppress(_Enough), nullcontext() if away is None else offloaded(away):
            warnings.simplefilter("ignore")  # such as that all rewards are the same
            for _ in loop:
                pass
        for parameter in subject.tuned.parameters():
            parameter.grad = None
    return found


def _replayed(flow: Flow | AdapterOff, memory: Counter, known: dict[Any, Cost]) -> Flow | AdapterOff:
    """A velocity field whose network is called once for each kind of call."""
    if isinstance(flow, AdapterOff):
        return flow
    network = cast(Any, flow.network)
    replayed = copy.copy(network)  # of the same weights
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    call = Replayed(
        network.forward,
        memory,
        "network",
        lambda: [] if is_off(replayed) else trained,
        known,
        contexts=shortened(network),
        within=lambda: network.disable_adapter() if is_off(replayed) else nullcontext(),
    )
    vars(replayed)["forward"] = call
    if has_adapter(network):  # switched where a call is measured alone: it has many layers, and calls are many
        vars(replayed)["disable_adapter"] = nullcontext
    return replace(flow, network=replayed)


def _reward(subject: Subject, memory: Counter, learner: LearnedReward | None) -> Replayed:
    """The reward, called once for each kind of call; one that learns does so at every iteration."""
    known, otherwise = subject.known["reward"], subject.measured_reward
    if learner is None:
        return Replayed(subject.reward, memory, "reward", known=known, numbers=True, otherwise=otherwise)
    return Learning(learner, memory, "reward", known=known, numbers=True, otherwise=otherwise, learner=learner)


@dataclass
class Learning(Replayed):
    """A reward that learns, of which all that its network, its optimizer and the data need is counted."""

    learner: LearnedReward = field(kw_only=True)

    @property
    def network(self) -> nn.Module:
        """The network that learns."""
        return self.learner.network

    def learn(self, x: Tensor, field: VelocityField, generator: torch.Generator) -> dict[str, float]:
        """Learn from samples without numbers."""
        return self.learner.learn(x, field, generator)

    def state_dict(self) -> dict[str, Any]:
        """The state, of which the loop keeps copies."""
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Change nothing."""


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


@dataclass(frozen=True)
class Parts:
    """Parts of a subject whose calls are counted: the velocity fields and the decoder are called once for each kind of call."""

    model: GenerativeModel
    tuned: Flow
    base: Flow | AdapterOff
    decoder: Replayed

    def of_flow(self, flow: Flow | AdapterOff, more: Mapping[str, Callable[..., Any]] = {}) -> Any:
        """The model of a velocity field, with noise and conditions that have no memory.

        Args:
            more: further methods of it that are changed.
        """
        model, decoder, view = self.model, self.decoder, copy.copy(self.model)

        def noise(self: Any, items: Sequence[Item], generator: torch.Generator, t: Tensor) -> Tensor:
            return shaped((len(items), *model.event_shape))

        def conditions(self: Any, items: Sequence[Item]) -> Any:
            with alone():
                found = model.conditions(items[:1])
            return _repeated(found, len(items))

        def encode(self: Any, prompts: Sequence[str], guidance_scale: float | None = None, pictures: Sequence[Any] = ()) -> Any:
            with alone():
                found = cast(Any, model).encode(prompts[:1], guidance_scale, pictures[:1])
            return _repeated(found, len(prompts))

        def decode(self: Any, x: Tensor, *, batch_size: int = 4) -> Tensor:
            return decoder(x, batch_size=batch_size)

        changed = {"noise": noise, "conditions": conditions, "encode": encode, "decode": decode, **more}
        object.__setattr__(view, "__class__", type(type(model).__name__, (type(model),), changed))
        object.__setattr__(view, "flow", flow)
        return view


def parts_without_memory(subject: Subject, memory: Counter) -> Parts:
    """The parts of a subject, counted by `memory`."""
    tuned, base = (_replayed(each, memory, subject.known["network"]) for each in (subject.tuned, subject.base))
    if isinstance(base, AdapterOff):
        base = AdapterOff(cast(Flow, tuned))
    decoder = Replayed(subject.model.decode, memory, "decoder", known=subject.known["decoder"])
    return Parts(subject.model, cast(Flow, tuned), base, decoder)


def _repeated(tree: Any, count: int) -> Any:
    """Nested tensors [1, ..], so many times, without memory."""
    return tree_map_only(Tensor, lambda part: shaped((count, *part.shape[1:]), part.dtype), tree)
