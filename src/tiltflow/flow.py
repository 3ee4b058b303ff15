"""Flow: a pretrained network seen as a velocity field, whatever it predicts and on whatever Gaussian path it was trained.

A sampler or a method sees a function (x, t) -> v on the linear path of `tiltflow.interpolant`: x is [batch, *event],
t is [] or [batch] in [0, 1] from noise to data, v has the shape of x. Nothing downstream knows about epsilon-prediction,
discrete timesteps or prompts.
"""

# Mutation tests: test_flow.py

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor, nn

from tiltflow import processes
from tiltflow.interpolant import (
    Coefficients,
    Interpolant,
    Linear,
    PredictionType,
    expand,
    interior,
    linear_time,
    mixture_weights,
)
from tiltflow.precision import autocast


class VelocityField(Protocol):
    """(x [batch, *event], t [] or [batch]) -> velocity [batch, *event] on the linear path."""

    def __call__(self, x: Tensor, t: Tensor, /) -> Tensor: ...


@runtime_checkable
class Prediction(Protocol):
    """A velocity field that is made of a network's prediction: a `Flow`, or whatever is around one."""

    def prediction_scale(self, t: Tensor) -> Tensor:
        """By how much the network's prediction changes for a change of velocity by 1, at t [] or [batch]: of the shape of t."""
        ...


def prediction_scale(flow: VelocityField, t: Tensor) -> Tensor:
    """By how much the prediction of the network changes for a change of velocity by 1, at t [] or [batch]; 1 for a plain
    function, which is its own prediction. Guidance does not change it: it mixes velocities as it mixes predictions."""
    return flow.prediction_scale(t) if isinstance(flow, Prediction) else torch.ones_like(t)


@dataclass(frozen=True)
class Flow:
    """A network, what it predicts and the interpolant it was trained on: together a velocity field on the linear path.

    Args:
        network: called as network(x, time) or, with a condition, network(x, time, condition); x is [batch, *event] in
            the interpolant's own coordinates, time is [batch] in the unit that the interpolant says (its own time, or
            a diffusion timestep).
        prediction: "velocity", "epsilon", "v" (diffusion v-prediction) or "x1" (the denoised sample).
        interpolant: the path of the training.
        condition: anything the network takes as a third argument. A tensor [batch, ..], or a mapping of such tensors, is one
            for each sample (labels, prompt embeddings), and follows the samples into parts of a batch; anything else is for
            all, and only passed on. Bind a new one for each batch with `bind`.
        autocast: the dtype in which the network is evaluated, torch.bfloat16 for mixed precision; None is its own. What it
            predicts comes back in the dtype of x.
    """

    network: Callable[..., Tensor]
    prediction: PredictionType = "velocity"
    interpolant: Interpolant = field(default_factory=Linear)
    condition: Any = None
    autocast: torch.dtype | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity x1hat - x0hat at x on the linear path: with p = a x_1 + b x_0 the prediction and X = (alpha + beta) x
        the state in the interpolant's coordinates, v = (alpha + beta) ((a + b) x - p) / (alpha b - beta a) solves the
        2x2 system of `interpolant.convert`. Linear paths with velocity prediction reduce to v = p, exactly."""
        s = self.interpolant.own_time(t.double() if t.device.type == "cpu" else t)
        time = self.interpolant.network_time(s).to(x).expand(len(x))
        arguments = (time,) if self.condition is None else (time, self.condition)
        if isinstance(self.interpolant, Linear) and self.prediction == "velocity":
            return self._predict(x, *arguments)
        c = self.interpolant(interior(s))
        a, b = mixture_weights(self.prediction, c)
        predicted = self._predict(x * expand(c.alpha + c.beta, x), *arguments)
        gain = self._gain(c, a, b)
        return x * expand(gain * (a + b), x) - predicted * expand(gain, x)

    def _gain(self, c: Coefficients, a: Tensor, b: Tensor) -> Tensor:
        return (c.alpha + c.beta) / (c.alpha * b - c.beta * a)

    def prediction_scale(self, t: Tensor) -> Tensor:
        """By how much the network's prediction changes for a change of velocity by 1, at t [] or [batch]: 1 for velocities on
        the linear path, t for epsilon, 1 - t for x1."""
        if isinstance(self.interpolant, Linear) and self.prediction == "velocity":
            return torch.ones_like(t)
        c = self.interpolant(interior(self.interpolant.own_time(t.double() if t.device.type == "cpu" else t)))
        return 1 / self._gain(c, *mixture_weights(self.prediction, c)).abs()

    def _predict(self, x: Tensor, *arguments: Any) -> Tensor:
        with autocast(self.autocast, x.device):
            return self.network(x, *arguments).to(x.dtype)

    def bind(self, condition: Any) -> Flow:
        """The same flow given `condition`."""
        return replace(self, condition=condition)

    def rows(self, which: Tensor | slice) -> Flow:
        """The same flow for those samples of the batch that it was bound to."""
        return self.bind(choose(self.condition, which))

    @property
    def noise_time(self) -> float:
        """The linear time at which the network's noise end sits: 0, or a little more for a diffusion schedule whose
        last timestep still holds some signal. Sampling starts there, from pure noise."""
        return float(linear_time(self.interpolant, torch.zeros((), dtype=torch.float64)))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of the network."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters of the network and their names."""
        network = cast(nn.Module, self.network)
        return ((name, p) for name, p in network.named_parameters() if p.requires_grad)


@dataclass(frozen=True)
class AdapterOff:
    """The base flow of an adapter fine-tune: the same network with its adapter switched off, so no second copy.

    `flow.network` must have peft's `disable_adapter()`. Merged adapters cannot be switched.
    """

    flow: Flow

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The adapter is off in this context; entering it again inside is nothing."""
        network = cast(Any, self.flow.network)
        if getattr(network, "adapter_is_off", False):
            yield
            return
        network.adapter_is_off = True
        try:
            with network.disable_adapter():
                yield
        finally:
            network.adapter_is_off = False

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        with self.disabled():
            return self.flow(x, t)

    def prediction_scale(self, t: Tensor) -> Tensor:
        """That of the flow."""
        return prediction_scale(self.flow, t)


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance (2207.12598): v = v_negative + guidance_scale (v - v_negative), from one flow given a condition
    and given its negative. At guidance_scale 1 it is the flow itself.

    Args:
        flow: bound to the conditions.
        negative: the same flow bound to the negative ones.
        seen: if there is one, the velocities of `flow` are put there, in order.
    """

    flow: VelocityField
    negative: VelocityField
    guidance_scale: float
    seen: list[Tensor] | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        v = self.flow(x, t)
        if self.seen is not None:
            self.seen.append(v)
        return v if self.guidance_scale == 1 else torch.lerp(self.negative(x, t), v, self.guidance_scale)

    def prediction_scale(self, t: Tensor) -> Tensor:
        """That of the flow."""
        return prediction_scale(self.flow, t)

    def rows(self, which: Tensor | slice) -> Guided:
        """The same for those samples of the batch."""
        return replace(self, flow=rows(self.flow, which), negative=rows(self.negative, which))

    def disabled(self) -> AbstractContextManager[None]:
        """The adapter of the flow is off in this context, if it is a base without a copy of its own."""
        switch: Callable[[], AbstractContextManager[None]] = getattr(self.flow, "disabled", nullcontext)
        return switch()


Guide = Callable[[VelocityField], Guided]
"""What turns a flow into the one that acts, guided, where only the samples that it learns from are."""


def observed(flow: VelocityField, guide: Guide | None) -> tuple[VelocityField, list[Tensor]]:
    """The flow that acts, and where the velocities of the unguided one will be found, if it is another."""
    seen: list[Tensor] = []
    return (flow if guide is None else replace(guide(flow), seen=seen)), seen


def bind(flow: VelocityField, condition: Any) -> VelocityField:
    """`flow`, whatever is around it, given `condition`."""
    if isinstance(flow, Flow):
        return flow.bind(condition)
    return cast(VelocityField, replace(cast(Any, flow), flow=bind(cast(Any, flow).flow, condition)))


def base_of(flow: Flow) -> Flow | AdapterOff:
    """The frozen base of `flow` as it is now: its adapter switched off where it has one, else one frozen copy."""
    if hasattr(flow.network, "disable_adapter"):
        return AdapterOff(flow)
    network = copy.deepcopy(flow.network)
    if isinstance(network, nn.Module):
        network.requires_grad_(False).eval()
    return replace(flow, network=network)


def linearize(flow: VelocityField, x: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(v, pullback) of `flow` at (x [batch, *event], t): pullback(c) = J^T c, by the one backward pass that v's graph allows.

    The switch of an adapter is off again during the pullback: activation checkpointing runs the forward once more there,
    and would otherwise differentiate the tuned network.
    """
    switch: Callable[[], AbstractContextManager[None]] = getattr(flow, "disabled", nullcontext)
    x = x.detach().requires_grad_()
    with switch(), torch.enable_grad():
        v = flow(x, t)

    def pullback(cotangent: Tensor) -> Tensor:
        with switch():
            (product,) = torch.autograd.grad(v, x, cotangent)
        return product

    return v.detach(), pullback


Part = TypeVar("Part")


def rows(part: Part, which: Tensor | slice) -> Part:
    """A velocity field, or a reward, for those samples of the batch: given their conditions or prompts, where it was bound to
    one for each sample. Anything with a method `rows`, or a dataclass around a `flow` that has one, is such a part."""
    if hasattr(part, "rows"):
        return cast(Part, part.rows(which))
    inner = getattr(part, "flow", None)
    return part if inner is None else cast(Part, replace(cast(Any, part), flow=rows(inner, which)))


def choose(condition: Any, which: Tensor | slice) -> Any:
    """The conditions of those samples, where there is one for each."""
    if isinstance(condition, Mapping):
        return {key: choose(value, which) for key, value in condition.items()}
    return condition[which] if isinstance(condition, Tensor) and condition.ndim > 0 else condition


def groups(flow: VelocityField, count: int, device: torch.device) -> list[Tensor]:
    """The indices of those of `count` samples that share a condition, for each condition; of all where there is one for all."""
    while hasattr(flow, "flow"):
        flow = flow.flow
    condition = getattr(flow, "condition", None)
    if isinstance(condition, Mapping):
        parts = [value.flatten(1).float() for value in condition.values() if isinstance(value, Tensor) and value.ndim > 1]
        condition = torch.cat(parts, 1) if parts else None
    if not isinstance(condition, Tensor) or condition.ndim == 0:
        return [torch.arange(count, device=device)]
    _, member = torch.unique(condition, dim=0, return_inverse=True)
    return [(member == i).nonzero()[:, 0].to(device) for i in range(int(member.max()) + 1)]


@dataclass(frozen=True)
class Chunked:
    """A velocity field that all processes evaluate together, each on at most `size` samples at a time."""

    flow: VelocityField
    size: int | None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        parts = processes.shares(len(x), self.size)
        return processes.gathered([rows(self.flow, part)(x[part], t[part] if t.ndim else t) for part in parts], len(x))

    def prediction_scale(self, t: Tensor) -> Tensor:
        """That of the flow."""
        return prediction_scale(self.flow, t)


def in_chunks(flow: VelocityField, size: int | None = None) -> VelocityField:
    """`flow`, evaluated by all processes and on at most `size` samples at a time: less time and memory, the same result."""
    return flow if size is None and processes.count() == 1 else Chunked(flow, size)


@contextmanager
def eval_mode(*networks: object) -> Iterator[None]:
    """Networks are in eval mode in this context, so dropout draws nothing and batch statistics stay as they are; afterwards
    every submodule is in its own mode again, also after an exception. What is no nn.Module is left alone."""
    modules = [network for network in networks if isinstance(network, nn.Module)]
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training


class CountEvaluations:
    """Counts how many samples networks are evaluated on, while it is the context: `with CountEvaluations(network) as count`.

    `poll` is called before each evaluation.
    """

    def __init__(self, *networks: object, poll: Callable[[], None] = lambda: None):
        self.poll = poll
        self.networks = {id(network): network for network in networks if isinstance(network, nn.Module)}
        self.total, self.counting = 0, True

    def __enter__(self) -> CountEvaluations:
        self.hooks = [network.register_forward_pre_hook(self._count) for network in self.networks.values()]
        return self

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is evaluated in this context is not counted, and `total` is right inside it too."""
        self.counting = False
        try:
            yield
        finally:
            self.counting = True

    def _count(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.poll()
        if self.counting:
            self.total += len(arguments[0])

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
