"""The training loop. It yields one record per optimizer step; printing, saving and stopping belong to the caller."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tiltflow.calibration import Calibration
from tiltflow.errors import InputError
from tiltflow.flow import AdapterOff, CountEvaluations, Flow, Guide, VelocityField
from tiltflow.optimization import WeightAverage, finite, gradient_norm, learning_rate_factor
from tiltflow.reward import Reward
from tiltflow.sampler import Start
from tiltflow.streams import stream


class Method(Protocol):
    """What the loop needs of a method; see `tiltflow.methods`."""

    learning_rate: float
    lr_scheduler: Any
    lr_warmup_steps: int
    adam_beta1: float
    adam_beta2: float
    adam_weight_decay: float
    max_grad_norm: float | None

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> Any: ...

    def gradients(
        self,
        tuned: VelocityField,
        base: VelocityField,
        reward: Reward,
        x: Tensor,
        generator: torch.Generator,
        state: Any,
        *,
        start: Start,
        micro_batch_size: int | None,
        policy: VelocityField | None,
        guide: Guide | None,
    ) -> Iterator[dict[str, float]]: ...

    def model_copy(self, *, update: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Batch:
    """What one iteration starts from.

    Args:
        x: starting points [batch, *event].
        bind: gives a flow the conditions of the batch; may guide it (`guidance_mode: full`).
        guide: see `tiltflow.methods`; guides samples only (`guidance_mode: rollout`).
        reward: of these samples, if it is told their prompts.
    """

    x: Tensor
    bind: Callable[[VelocityField], VelocityField] = lambda flow: flow
    guide: Guide | None = None
    reward: Reward | None = None


@dataclass(frozen=True)
class Record:
    """One optimizer step: what the method measured before it, and what it cost so far."""

    step: int
    metrics: dict[str, float]
    seconds: float
    network_evaluations: int
    """Samples that the tuned and the base network have been evaluated on, counted together."""


@dataclass(frozen=True)
class Averaged:
    """A flow at the moving average of its weights."""

    flow: VelocityField
    average: WeightAverage

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        with self.average.applied():
            return self.flow(x, t)


def train(
    tuned: Flow,
    base: Flow | AdapterOff,
    method: Method,
    reward: Reward,
    draw: Callable[[torch.Generator], Tensor | Batch],
    *,
    max_train_steps: int,
    seed: int = 0,
    start: Start = 0.0,
    ema_decay: float = 0.0,
    micro_batch_size: int | None = None,
    calibration: Calibration | None = None,
    network_evaluations: int = 0,
    adam: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> Generator[Record, None, None]:
    """Tune the trainable parameters of `tuned` in place.

    Args:
        draw: starting points [batch, *event] at time `start`, from a generator; or a whole `Batch`.
        ema_decay: decay of the moving average of the weights; when the iterator ends, or is closed, the parameters are
            that average. Trajectories are drawn from it too: it is the better flow, and less noisy.
        calibration: adapts the temperature that the method works at; `beta` in the metrics.
        network_evaluations: how many were spent before, on the calibration; the records count on from there.
        adam: an optimizer with the arguments of AdamW, such as one that keeps its state in 8 bits.

    Raises NonFiniteError, before the optimizer steps, if a loss, a reward or a gradient is not finite.
    """
    parameters = list(tuned.parameters())
    if not parameters:
        raise ValueError("the tuned network has no parameter that requires a gradient")
    optimizer = adam(
        parameters,
        lr=method.learning_rate,
        betas=(method.adam_beta1, method.adam_beta2),
        weight_decay=method.adam_weight_decay,
    )
    average = WeightAverage(parameters, ema_decay)
    working = method
    device, state, step, began = parameters[0].device, None, 0, time.perf_counter()
    networks = (tuned.network, base.flow.network if isinstance(base, AdapterOff) else base.network)
    try:
        with CountEvaluations(*networks) as count:
            while step < max_train_steps:
                drawn = draw(stream(seed, "start", step, device=device))
                batch = drawn if isinstance(drawn, Batch) else Batch(drawn)
                if state is None:
                    state = method.new_state(tuple(batch.x.shape[1:]), seed, device)
                if calibration is not None:
                    working = method.model_copy(update={"beta": calibration.working_beta})
                updates = working.gradients(
                    batch.bind(tuned),
                    batch.bind(base),
                    batch.reward or reward,
                    batch.x,
                    stream(seed, "rollout", step, device=device),
                    state,
                    start=start,
                    micro_batch_size=micro_batch_size,
                    policy=batch.bind(Averaged(tuned, average)) if ema_decay else None,
                    guide=batch.guide,
                )
                for measured in updates:
                    step += 1
                    finite(measured["loss"], "the loss", step)
                    norm = gradient_norm(parameters, method.max_grad_norm, step)
                    factor = learning_rate_factor(
                        step, warmup=method.lr_warmup_steps, total=max_train_steps, scheduler=method.lr_scheduler
                    )
                    optimizer.param_groups[0]["lr"] = method.learning_rate * factor
                    optimizer.step()
                    optimizer.zero_grad()
                    average.update()
                    if calibration is not None:
                        measured = {**measured, "beta": calibration.working_beta}
                    metrics = {**measured, "gradient_norm": norm, "learning_rate": method.learning_rate * factor}
                    yield Record(step, metrics, time.perf_counter() - began, network_evaluations + count.total)
                    if step == max_train_steps:
                        break
                if calibration is not None:
                    calibration.update(measured["reward"])
    finally:
        if ema_decay:
            average.store()


def trainable_copy(flow: Flow, trainable: str | re.Pattern[str] = "") -> Flow:
    """`flow` with a copy of its network whose parameters require gradients: all of them, or those in whose name the regular
    expression `trainable` is found. Raises InputError if it is found in none."""
    network = copy.deepcopy(flow.network)
    if isinstance(network, nn.Module):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(re.search(trainable, name) is not None)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            parts = ", ".join(name for name, _ in network.named_children())
            pattern = re.compile(trainable).pattern
            raise InputError(f"training.trainable: {pattern!r} is in the name of no parameter; the network's parts are {parts}")
    return replace(flow, network=network)
