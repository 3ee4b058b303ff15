"""The training loop. It yields one record per optimizer step; printing, saving and stopping belong to the caller."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow import processes
from tiltflow.control.objective import RunningReward
from tiltflow.errors import CheckpointError, InputError, Interrupted, NonFiniteError, UserCodeError
from tiltflow.flows.adapter import AdapterOff
from tiltflow.flows.at_weights import AtWeights
from tiltflow.flows.counting import CountEvaluations
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.flows.flow import Flow
from tiltflow.optimization import WeightAverage, adamw, finite, gradient_norm, load_optimizer
from tiltflow.rewards import LearnedReward, NonFiniteRewards, Reward
from tiltflow.rewards.functions.failures import ENOUGH, MANY, Failures
from tiltflow.rewards.functions.normalised import PerPrompt
from tiltflow.samplers.grid import Start
from tiltflow.samplers.stored import AS_COMPUTED, Storage
from tiltflow.streams import stream
from tiltflow.tensor_file import Tree
from tiltflow.timing import Clock, phase
from tiltflow.training.batch import Batch, Drawn, Ordered
from tiltflow.training.memory import forget_peak, peak_memory
from tiltflow.training.method import Method, Stateful
from tiltflow.training.optimizer import Optimizer, fill_optimizer, learning_rate_factor
from tiltflow.training.temperature import Temperature


@dataclass(frozen=True)
class Record:
    """One optimizer step: the metrics measured before it, and the cost so far."""

    step: int
    metrics: dict[str, float]
    seconds: float
    network_evaluations: int
    """Samples on which the tuned and the base network were evaluated, added up."""
    samples_drawn: int = 0
    """Samples drawn from the model for training; one that several steps learn from is counted once."""
    seconds_by_phase: Mapping[str, float] = field(default_factory=dict)
    """Since the record before, by `tiltflow.timing.PHASES`."""
    peak_memory: int | None = None
    """Peak bytes so far; see `tiltflow.training.memory.peak_memory`."""


@dataclass(frozen=True)
class BatchEnd:
    """A point between batches at which training can be checkpointed or stopped.

    Args:
        step: optimizer steps taken so far.
        state: gives the state that `train(resume_from=..)` takes.
        averaged: the context in which the weights are their moving average.
        stopping: True where Interrupted, or an exception of user code, is raised next.
    """

    step: int
    state: Callable[[], Tree]
    averaged: Callable[[], AbstractContextManager[None]]
    stopping: bool = False


def train(
    tuned: Flow,
    base: Flow | AdapterOff,
    method: Method,
    reward: Reward,
    draw: Callable[[torch.Generator], Tensor | Drawn] | Ordered,
    *,
    max_train_steps: int,
    optimizer: Optimizer | None = None,
    seed: int = 0,
    start: Start = 0.0,
    ema_decay: float = 0.0,
    micro_batch_size: int | None = None,
    temperature: Temperature | None = None,
    network_evaluations: int = 0,
    adam: Callable[..., torch.optim.Optimizer] = adamw,
    max_skipped_steps: int = 0,
    non_finite_rewards: NonFiniteRewards = "error",
    running: RunningReward | None = None,
    storage: Storage = AS_COMPUTED,
    resume_from: Tree | None = None,
    on_batch_end: Callable[[BatchEnd], None] = lambda end: None,
    stop: Callable[[], int | None] = lambda: None,
) -> Generator[Record, None, None]:
    """Tune the trainable parameters of `tuned` in place. Until the iterator ends, or is closed, both networks, and a reward
    that is a module, are in eval mode: the policy that is trained must be the one that is sampled.

    Args:
        draw: starting points [batch, *event] at time `start`, from a generator; or a whole `Drawn`; or `Ordered`.
        optimizer: settings of AdamW and its schedule; by default the method's own.
        ema_decay: decay of the moving average of the weights; when the iterator ends, or is closed, the parameters are
            that average. Trajectories are drawn from it too: it is the better flow, and less noisy.
        temperature: adapts the temperature that the method works at; `beta` in the metrics.
        network_evaluations: how many were spent before, on a calibration; the records count from there.
        adam: an optimizer with the arguments of AdamW, such as one that keeps its state in 8 bits.
        max_skipped_steps: how many steps in a row may be skipped because a number in them is not finite.
        non_finite_rewards: `error` raises for samples whose reward is NaN or infinite; `drop` leaves them out, and counts them
            in the metrics (`dropped`).
        running: a running reward along the paths, for methods that can have one.
        storage: how trajectories are stored.
        resume_from: the state of an earlier loop with the same arguments; training resumes from it bit for bit.
        on_batch_end: called after all the steps on a batch, and before Interrupted is raised. Networks that it evaluates are
            not counted.
        stop: called at every evaluation of a network; gives the number of the signal that asks to stop, or None.

    Raises NonFiniteError, before the optimizer steps, if a loss, a reward or a gradient is not finite; Interrupted if it is
    asked to stop, and UserCodeError if a function of the user raises an exception, both with the state as it was before the
    batch, or after it where the weights have moved already; InputError if `resume_from` is of another model or method.
    """
    processes.distribute(*networks_of(tuned, base))
    trained = dict(tuned.named_parameters())
    if not trained:
        raise InputError("nothing can be trained: no parameter of the network requires a gradient")
    settings = fill_optimizer(method, optimizer)
    loop = _Loop(
        tuned,
        base,
        method,
        reward,
        trained,
        adam(
            trained.values(),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.adam_weight_decay,
        ),
        settings,
        WeightAverage(trained.values(), ema_decay),
        max_train_steps=max_train_steps,
        seed=seed,
        start=start,
        micro_batch_size=micro_batch_size,
        temperature=temperature,
        non_finite_rewards=non_finite_rewards,
        running=running,
        storage=storage,
        stop=stop,
        spent=network_evaluations,
    )
    try:
        with eval_mode(*networks_of(tuned, base), reward), loop.count, loop.clock, loop.failures:
            if resume_from is not None:
                loop.load_state_dict(resume_from)
            while loop.step < max_train_steps:
                end = partial(BatchEnd, state=loop.state_dict, averaged=loop.average.applied)
                try:
                    yield from loop.batch(draw)
                except Interrupted:
                    on_batch_end(end(loop.step, stopping=True))
                    raise
                except UserCodeError:
                    if loop.as_before and processes.count() == 1:  # other processes may not have raised
                        on_batch_end(end(loop.step, stopping=True))
                    raise
                except NonFiniteError:
                    if loop.skipped > max_skipped_steps:
                        raise
                    yield from loop.record({"skipped": 1.0})
                with loop.count.paused(), loop.clock.paused(), loop.failures.paused():
                    on_batch_end(end(loop.step))
    finally:
        if ema_decay:
            loop.average.store()


@dataclass
class _Loop:
    """The state of `train`, and its handling of a batch."""

    tuned: Flow
    base: Flow | AdapterOff
    method: Method
    reward: Reward
    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    settings: Optimizer
    """Settings of the optimizer."""
    average: WeightAverage
    max_train_steps: int
    seed: int
    start: Start
    micro_batch_size: int | None
    temperature: Temperature | None
    non_finite_rewards: NonFiniteRewards
    running: RunningReward | None
    storage: Storage
    stop: Callable[[], int | None]
    spent: int
    """Network evaluations before the loop began."""

    step: int = 0
    drawn: int = 0
    """Samples drawn for training."""
    failed: int = 0
    """Those whose reward could not be computed."""
    told: bool = False
    """Whether that these are many has been said."""
    skipped: int = 0
    """Batches skipped in a row."""
    of_method: Any = None
    """The method's state between iterations."""
    resumed: Tree | None = None
    before: Tree | None = None
    """`learners` before the batch."""
    moved: bool = True
    """True once the weights have changed in this batch, which is then finished before training stops."""
    as_before: bool = True
    """True where the state is that before the batch that was abandoned."""

    def __post_init__(self) -> None:
        self.count = CountEvaluations(*networks_of(self.tuned, self.base), poll=self.poll)
        self.device, self.began = next(iter(self.trained.values())).device, time.perf_counter()
        self.clock = Clock(self.device)
        self.failures = Failures(self.device)
        forget_peak(self.device)

    def poll(self) -> None:
        """Raises Interrupted if a signal asks to stop and the batch can be abandoned."""
        if not self.moved and (signal := processes.greatest(self.stop() or 0, self.device)):
            raise Interrupted(f"stopped by signal {signal} at step {self.step}", signal)

    def record(self, metrics: dict[str, float]) -> Iterator[Record]:
        """Yields the record of an optimizer step. What its receiver does is not measured."""
        cost = (time.perf_counter() - self.began, self.evaluations, self.drawn)
        failed = self.failures.taken()
        self.warn_of_failures(int(failed.get("failed", 0)))
        record = Record(self.step, metrics | failed, *cost, self.clock.taken(), peak_memory(self.device))
        with self.clock.paused(), self.failures.paused():
            yield record

    @property
    def evaluations(self) -> int:
        """Samples on which networks were evaluated, in all processes."""
        return self.spent + self.count.total * processes.count()

    # ---- checkpoints ----

    def learners(self) -> Tree:
        """States that may change while trajectories are drawn: of the method and of the reward."""
        return {"method": self.state_of_method(), "reward": self.of_reward()}

    def state_of_method(self) -> Tree:
        """The state of a method that has one; else nothing."""
        return self.of_method.state_dict() if isinstance(self.of_method, Stateful) else {}

    def of_reward(self) -> Tree:
        """The state of a reward that learns, or that is normalised by the base's rewards; else nothing."""
        return self.reward.state_dict() if isinstance(self.reward, LearnedReward | PerPrompt) else {}

    def put_back(self, tree: Tree) -> None:
        """Restore `learners`."""
        if isinstance(self.of_method, Stateful):
            self.of_method.load_state_dict(tree["method"])
        self.put_reward_back(tree["reward"])

    def put_reward_back(self, tree: Tree) -> None:
        """Restore `of_reward`."""
        if isinstance(self.reward, LearnedReward | PerPrompt):
            self.reward.load_state_dict(tree)

    def state_dict(self) -> Tree:
        """The state that `load_state_dict` takes."""
        return {
            "step": self.step,
            "seconds": time.perf_counter() - self.began,
            "network_evaluations": self.evaluations,
            "samples_drawn": self.drawn,
            "failed": self.failed,
            "skipped": self.skipped,
            "parameters": self.trained,
            "buffers": buffers_of(self.tuned.network),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "temperature": None if self.temperature is None else self.temperature.state_dict(),
            **self.learners(),
        }

    def load_state_dict(self, state: Tree) -> None:
        """Resume from a state. Raises InputError if it is of another model, CheckpointError if it is not that of a loop."""
        try:
            load_weights(state, self.trained, buffers_of(self.tuned.network))
            load_optimizer(self.optimizer, state["optimizer"])
            self.average.load_state_dict(state["average"])
            if self.temperature is not None:
                self.temperature.load_state_dict(temperature_state(state))
            self.put_reward_back(state["reward"])
            self.step, self.skipped, self.spent = (int(state[key]) for key in ("step", "skipped", "network_evaluations"))
            self.began -= float(state["seconds"])
            # earlier versions did not count them
            self.drawn, self.failed = (int(state.get(key, 0)) for key in ("samples_drawn", "failed"))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"resume: the checkpoint is not of this training loop ({error!r})") from None
        self.resumed = state

    # ---- a batch ----

    def batch(self, draw: Callable[[torch.Generator], Tensor | Drawn] | Ordered) -> Iterator[Record]:
        """Take all optimizer steps on a batch. Raises NonFiniteError, Interrupted and UserCodeError; where the weights have not
        changed yet, all states are then as before the batch."""
        memory, evaluated = self.before or {}, self.count.total
        self.moved, self.before = False, None
        # drawing the batch may compute statistics of the base's rewards
        reward = copied(self.of_reward(), memory.get("reward"))
        try:
            now = draw.at(self.drawn) if isinstance(draw, Ordered) else draw
            found = now(stream(self.seed, "start", self.step, device=self.device))
            drawn = found if isinstance(found, Drawn) else Drawn(found)
            if self.of_method is None:
                self.of_method = self.method.new_state(tuple(drawn.x.shape[1:]), self.seed, self.device)
                if self.resumed is not None and isinstance(self.of_method, Stateful):
                    self.of_method.load_state_dict(self.resumed["method"])
            learned = reward if isinstance(self.reward, LearnedReward) else copied(self.of_reward())
            self.before = {"method": copied(self.state_of_method(), memory.get("method")), "reward": learned}
            self.poll()
            measured: dict[str, float] = {}
            for measured in self.updates(drawn):
                if not self.moved:
                    self.drawn += len(drawn.x)
                    self.warn_of_constant_reward(measured, len(drawn.x))
                self.moved = True
                self.step += 1
                metrics = {**measured, **self.optimize(measured)}
                if self.temperature is not None:
                    metrics["beta"] = self.temperature.working_beta
                    metrics["beta_at_limit"] = float(self.temperature.at_limit)
                yield from self.record(metrics)
                if self.step == self.max_train_steps:
                    return
            if self.temperature is not None:
                self.temperature.update(measured, self.step)
        except (Interrupted, NonFiniteError, UserCodeError) as error:
            self.optimizer.zero_grad()
            if not self.moved and self.before is not None:
                self.put_back(self.before)
                self.before = None  # an optimizer may have taken its tensors for its own
            self.as_before = not self.moved
            if not isinstance(error, NonFiniteError):
                self.count.total = evaluated
                if self.as_before:
                    self.put_reward_back(reward)
            else:
                self.step += not self.moved  # otherwise it is counted already
                self.skipped += 1
                error.where |= {"step": self.step, "seed": self.seed}
            self.moved = True
            raise

    def warn_of_constant_reward(self, measured: Mapping[str, float], count: int) -> None:
        """Warn if all samples of the first batch have the same reward; no error, as a rare reward may do that by chance. A
        first variation that is known by its gradient alone has no values."""
        if not getattr(self.reward, "valued", True):
            return
        if self.step == 0 and count > 1 and self.running is None and measured.get("reward_std") == 0 and processes.is_main():
            warnings.warn(
                f"the reward is {measured['reward']:g} for all {count} samples of the first batch: nothing is learned from it",
                stacklevel=2,
            )

    def warn_of_failures(self, failed: int) -> None:
        """Warn once if that of many samples could not be computed: of `failed` more than before."""
        self.failed += failed
        if self.told or self.failed < ENOUGH or self.failed <= MANY * self.drawn:
            return
        self.told = True
        if processes.is_main():
            warnings.warn(
                f"the reward could not be computed for {self.failed} of the first {self.drawn} samples, which count with the"
                " value that it has for failures: the law that is learned is in part that of this value",
                stacklevel=2,
            )

    def updates(self, drawn: Drawn) -> Iterator[dict[str, float]]:
        """Run the method on a batch: yields its metrics before each optimizer step, with the gradient accumulated."""
        method = self.method
        if self.temperature is not None:
            method = method.at_temperature(self.temperature.working_beta)
        batch = Batch(
            x=drawn.x,
            tuned=drawn.bind(self.tuned),
            base=drawn.bind(self.base),
            reward=drawn.reward or self.reward,
            generator=stream(self.seed, "rollout", self.step, device=self.device),
            start=self.start,
            actor=drawn.bind(AtWeights(self.tuned, self.average)) if self.average.decay else None,
            guide=drawn.guide,
            micro_batch_size=self.micro_batch_size,
            non_finite=self.non_finite_rewards,
            running=self.running,
            parameters=tuple(self.trained.values()),
            step=self.step,
            max_train_steps=self.max_train_steps,
            storage=self.storage,
            texts=drawn.texts,
        )
        return method.gradients(batch, self.of_method)

    @phase("update")
    def optimize(self, measured: dict[str, float]) -> dict[str, float]:
        """Take an optimizer step. Raises NonFiniteError, with the weights as before, if loss or gradient is not finite."""
        settings = self.settings
        factor = learning_rate_factor(
            self.step,
            warmup=settings.lr_warmup_steps,
            total=self.max_train_steps,
            scheduler=settings.lr_scheduler,
            from_zero=settings.lr_warmup_from_zero,
        )
        finite(measured["loss"], "the loss", self.step)
        processes.sum_gradients(self.trained.values())
        norm = gradient_norm(list(self.trained.values()), settings.max_grad_norm, self.step, list(self.trained))
        self.optimizer.param_groups[0]["lr"] = settings.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()
        self.skipped = 0
        return {"gradient_norm": norm, "learning_rate": settings.learning_rate * factor}


def copied(tree: Any, memory: Any = None) -> Any:
    """A copy of a state and its tensors; `copy.deepcopy` takes several times as long for these.

    Args:
        memory: an earlier copy that nothing needs any more. Tensors are written into those of it that are like them: new memory
            takes several times as long.
    """
    if isinstance(tree, Tensor):
        fits = isinstance(memory, Tensor) and _kind(memory) == _kind(tree)
        return memory.copy_(tree.detach()) if fits else tree.detach().clone()
    if isinstance(tree, dict):
        return {key: copied(value, memory.get(key) if isinstance(memory, dict) else None) for key, value in tree.items()}
    return [copied(each) for each in tree] if isinstance(tree, list) else copy.deepcopy(tree)


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.stride()


def networks_of(tuned: Flow, base: Flow | AdapterOff) -> tuple[Any, Any]:
    """Both networks; the same one where the base is the tuned flow with its adapter off."""
    return tuned.network, base.network


def temperature_state(state: Tree) -> Tree:
    """The state of the temperature in that of a loop; earlier versions had it under another name."""
    found: Tree = state["temperature"] if "temperature" in state else state["calibration"]
    return found


def buffers_of(network: object) -> dict[str, Tensor]:
    """The buffers of a network, by name."""
    return dict(network.named_buffers()) if isinstance(network, nn.Module) else {}


@torch.no_grad()
def load_weights(state: Tree, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Load the weights of a saved state. Raises InputError if they are of another network."""
    for kind, own in (("parameters", parameters), ("buffers", buffers)):
        saved = state[kind]
        for name in sorted(own.keys() ^ saved.keys()):
            where = "checkpoint" if name in own else "model"
            raise InputError(f"resume: the {where} has no {kind.removesuffix('s')} {name}; is it from another model?")
        for name, tensor in own.items():
            if tensor.shape != saved[name].shape:
                raise InputError(
                    f"resume: {name} is of shape {list(saved[name].shape)} in the checkpoint, {list(tensor.shape)} in the model"
                )
            tensor.copy_(processes.part_like(saved[name], tensor))
    processes.weights_changed()
