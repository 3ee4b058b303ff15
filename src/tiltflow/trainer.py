"""The training loop. It yields one record per optimizer step; printing, saving and stopping belong to the caller."""

from __future__ import annotations

import copy
import itertools
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tiltflow.calibration import Calibration
from tiltflow.checkpoint import Tree
from tiltflow.errors import CheckpointError, InputError, Interrupted, NonFiniteError
from tiltflow.flow import AdapterOff, CountEvaluations, Flow, Guide, Guided, VelocityField, rows
from tiltflow.optimization import WeightAverage, adamw, finite, gradient_norm, learning_rate_factor, load_optimizer
from tiltflow.reward import LearnedReward, Reward
from tiltflow.sampler import Start
from tiltflow.streams import stream

MOST_ATTEMPTS, FEWEST = 3, 2
"""How often a batch is drawn again without the samples whose reward is not finite, and how many must be left."""
NonFiniteRewards = Literal["error", "drop"]


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

    def part(self, kept: Sequence[int]) -> Batch:
        """The same for those samples alone."""
        which, guide = torch.tensor(kept, device=self.x.device), self.guide

        def guide_part(flow: VelocityField) -> Guided:
            assert guide is not None
            guided = guide(flow)
            return replace(guided, negative=rows(guided.negative, which))

        return Batch(
            self.x[which],
            lambda flow: rows(self.bind(flow), which),
            None if guide is None else guide_part,
            None if self.reward is None else rows(self.reward, which),
        )


@dataclass(frozen=True)
class Record:
    """One optimizer step: what the method measured before it, and what it cost so far."""

    step: int
    metrics: dict[str, float]
    seconds: float
    network_evaluations: int
    """Samples that the tuned and the base network have been evaluated on, counted together."""


@dataclass(frozen=True)
class BatchEnd:
    """The moment after all the optimizer steps on a batch, when a loop can be left and gone on with.

    Args:
        step: optimizer steps taken so far.
        state: gives what `train(resume_from=..)` takes.
        averaged: the context in which the weights are their moving average.
        stopping: whether Interrupted is raised next.
    """

    step: int
    state: Callable[[], Tree]
    averaged: Callable[[], AbstractContextManager[None]]
    stopping: bool = False


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
    adam: Callable[..., torch.optim.Optimizer] = adamw,
    max_skipped_steps: int = 0,
    non_finite_rewards: NonFiniteRewards = "error",
    resume_from: Tree | None = None,
    on_batch_end: Callable[[BatchEnd], None] = lambda end: None,
    stop: Callable[[], int | None] = lambda: None,
) -> Generator[Record, None, None]:
    """Tune the trainable parameters of `tuned` in place.

    Args:
        draw: starting points [batch, *event] at time `start`, from a generator; or a whole `Batch`.
        ema_decay: decay of the moving average of the weights; when the iterator ends, or is closed, the parameters are
            that average. Trajectories are drawn from it too: it is the better flow, and less noisy.
        calibration: adapts the temperature that the method works at; `beta` in the metrics.
        network_evaluations: how many were spent before, on the calibration; the records count on from there.
        adam: an optimizer with the arguments of AdamW, such as one that keeps its state in 8 bits.
        max_skipped_steps: how many steps in a row may be left out because a number in them is not finite.
        non_finite_rewards: what happens to samples whose reward is NaN or infinite: an error, or they are dropped, and counted
            in the metrics, and what is left of the batch is drawn again.
        resume_from: the state of an earlier loop with the same arguments, to go on from, bit for bit.
        on_batch_end: called after all the steps on a batch, and before Interrupted is raised. Networks that it evaluates are
            not counted.
        stop: asked at every evaluation of a network; the number of the signal that asks to stop, if one does.

    Raises NonFiniteError, before the optimizer steps, if a loss, a reward or a gradient is not finite; Interrupted, with the
    state as it was before the batch, or after it where the weights have moved already, if it is asked to stop; InputError if
    `resume_from` is of another model or method.
    """
    trained = dict(tuned.named_parameters())
    if not trained:
        raise ValueError("the tuned network has no parameter that requires a gradient")
    names, parameters = list(trained), list(trained.values())
    optimizer = adam(
        parameters,
        lr=method.learning_rate,
        betas=(method.adam_beta1, method.adam_beta2),
        weight_decay=method.adam_weight_decay,
    )
    average = WeightAverage(parameters, ema_decay)
    working, device, step, skipped = method, parameters[0].device, 0, 0
    began, movable = time.perf_counter(), False
    state: Any = None

    def poll() -> None:
        if movable and (signal := stop()) is not None:
            raise Interrupted(f"stopped by signal {signal} at step {step}", signal)

    networks = (tuned.network, base.flow.network if isinstance(base, AdapterOff) else base.network)
    try:
        with CountEvaluations(*networks, poll=poll) as count:

            def learners() -> Tree:
                """What may change while trajectories are drawn, before the weights do."""
                return {
                    "method": state.state_dict() if hasattr(state, "state_dict") else {},
                    "reward": reward.state_dict() if isinstance(reward, LearnedReward) else {},
                }

            def put_back(tree: Tree) -> None:
                if hasattr(state, "load_state_dict"):
                    state.load_state_dict(tree["method"])
                if isinstance(reward, LearnedReward):
                    reward.load_state_dict(tree["reward"])

            def current() -> Tree:
                return {
                    "step": step,
                    "seconds": time.perf_counter() - began,
                    "network_evaluations": network_evaluations + count.total,
                    "skipped": skipped,
                    "parameters": trained,
                    "buffers": buffers_of(tuned.network),
                    "optimizer": optimizer.state_dict(),
                    "average": average.state_dict(),
                    "calibration": None if calibration is None else calibration.state_dict(),
                    **learners(),
                }

            if resume_from is not None:
                try:
                    load_weights(resume_from, trained, buffers_of(tuned.network))
                    load_optimizer(optimizer, resume_from["optimizer"])
                    average.load_state_dict(resume_from["average"])
                    if calibration is not None:
                        calibration.load_state_dict(resume_from["calibration"])
                    step, skipped = int(resume_from["step"]), int(resume_from["skipped"])
                    began -= float(resume_from["seconds"])
                    network_evaluations = int(resume_from["network_evaluations"])
                except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                    raise CheckpointError(f"resume: the checkpoint is not of this training loop ({error!r})") from None

            def iteration(batch: Batch) -> tuple[Iterator[dict[str, float]], dict[str, float] | None, int]:
                """An iteration up to its first gradient: what gives the others, what was measured, and how many samples were
                left out because their reward is not finite. What is left is drawn again, with other noise."""
                kept = list(range(len(batch.x)))
                for attempt in itertools.count():
                    part = batch.part(kept) if attempt else batch
                    again = (attempt,) if attempt else ()
                    updates = working.gradients(
                        part.bind(tuned),
                        part.bind(base),
                        part.reward or reward,
                        part.x,
                        stream(seed, "rollout", step, *again, device=device),
                        state,
                        start=start,
                        micro_batch_size=micro_batch_size,
                        policy=part.bind(Averaged(tuned, average)) if ema_decay else None,
                        guide=part.guide,
                    )
                    try:
                        return updates, next(updates, None), len(batch.x) - len(kept)
                    except NonFiniteError as error:
                        bad = error.where["samples"] if error.where.get("what") == "reward" else []
                        left = [kept[i] for i in range(len(kept)) if i not in bad]
                        if non_finite_rewards == "error" or not bad or len(left) < FEWEST or attempt == MOST_ATTEMPTS:
                            raise
                        kept = left
                        assert before is not None
                        put_back(before)
                        optimizer.zero_grad()
                raise AssertionError("the last attempt returns or raises")

            while step < max_train_steps:
                before, evaluated = None, count.total
                try:
                    movable = True
                    drawn = draw(stream(seed, "start", step, device=device))
                    batch = drawn if isinstance(drawn, Batch) else Batch(drawn)
                    if state is None:
                        state = method.new_state(tuple(batch.x.shape[1:]), seed, device)
                        if resume_from is not None:
                            put_back(resume_from)
                    before = copy.deepcopy(learners())
                    if calibration is not None:
                        working = method.model_copy(update={"beta": calibration.working_beta})
                    poll()
                    updates, measured, dropped = iteration(batch)
                    while measured is not None:
                        movable = False  # the weights are about to change: the batch is taken to its end
                        step += 1
                        factor = learning_rate_factor(
                            step, warmup=method.lr_warmup_steps, total=max_train_steps, scheduler=method.lr_scheduler
                        )
                        finite(measured["loss"], "the loss", step)
                        norm = gradient_norm(parameters, method.max_grad_norm, step, names)
                        optimizer.param_groups[0]["lr"] = method.learning_rate * factor
                        optimizer.step()
                        optimizer.zero_grad()
                        average.update()
                        skipped = 0
                        if calibration is not None:
                            measured = {**measured, "beta": calibration.working_beta}
                        if dropped:
                            measured = {**measured, "dropped": float(dropped)}
                        metrics = {**measured, "gradient_norm": norm, "learning_rate": method.learning_rate * factor}
                        yield Record(step, metrics, time.perf_counter() - began, network_evaluations + count.total)
                        if step == max_train_steps:
                            break
                        last, measured = measured, next(updates, None)
                    if calibration is not None and measured is None:
                        calibration.update(last["reward"])
                except Interrupted:
                    optimizer.zero_grad()
                    count.total = evaluated
                    if before is not None:
                        put_back(before)
                    on_batch_end(BatchEnd(step, current, average.applied, stopping=True))
                    raise
                except NonFiniteError as error:
                    optimizer.zero_grad()
                    if movable and before is not None:
                        put_back(before)
                    step += movable  # else it is counted already
                    error.where |= {"step": step, "seed": seed}
                    skipped += 1
                    if skipped > max_skipped_steps:
                        raise
                    yield Record(step, {"skipped": 1.0}, time.perf_counter() - began, network_evaluations + count.total)
                movable, evaluated = False, count.total
                on_batch_end(BatchEnd(step, current, average.applied))
                count.total = evaluated
    finally:
        if ema_decay:
            average.store()


def buffers_of(network: object) -> dict[str, Tensor]:
    """The tensors of a network that are no parameters, but change with it."""
    return dict(network.named_buffers()) if isinstance(network, nn.Module) else {}


@torch.no_grad()
def load_weights(state: Tree, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Put the weights of a saved state in place. Raises InputError if they are of another network."""
    for kind, own in (("parameters", parameters), ("buffers", buffers)):
        saved = state[kind]
        for name in sorted(own.keys() ^ saved.keys()):
            raise InputError(f"resume: {name} is in {'the model' if name in own else 'the checkpoint'} alone: another model?")
        for name, tensor in own.items():
            if tensor.shape != saved[name].shape:
                raise InputError(
                    f"resume: {name} is of shape {list(saved[name].shape)} in the checkpoint, {list(tensor.shape)} in the model"
                )
            tensor.copy_(saved[name])


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
