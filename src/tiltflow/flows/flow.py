"""Flow: a pretrained network seen as a velocity field, whatever it predicts and on whatever Gaussian path it was trained.

A sampler or a method sees a function (x, t) -> v on the linear path of `tiltflow.flows.interpolant`: x is [batch, *event],
t is [] or [batch] in [0, 1] from noise to data, v has the shape of x. Nothing downstream knows about epsilon-prediction,
discrete timesteps or prompts.
"""

# Mutation tests: test_flow.py test_your_own_model.py test_networks_of_others.py test_conditions.py

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar, cast, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from tiltflow import processes
from tiltflow.errors import InputError, did_you_mean
from tiltflow.flows.interpolant import (
    Coefficients,
    DiscreteVariancePreserving,
    Interpolant,
    Linear,
    PredictionType,
    expand,
    interior,
    linear_time,
    mixture_weights,
)
from tiltflow.flows.precision import autocast
from tiltflow.user_code import explanation, passes_through

TimeDirection = Literal["noise-to-data", "data-to-noise"]
TIMES = ("t", "ts", "tau", "time", "times", "timestep", "timesteps", "sigma", "sigmas")
"""What a network calls its time."""


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


class AnyFloats(nn.Module):
    """A network that takes samples of any float dtype, whatever that of its weights, and predicts in theirs."""


@dataclass(frozen=True)
class Flow:
    """A network, what it predicts and the interpolant it was trained on: together a velocity field on the linear path.

    Args:
        network: called as network(x, time) or, with a condition, network(x, time, condition); x is [batch, *event] in
            the interpolant's own coordinates and in the dtype of the network's weights, time is [batch], float32 or better, in
            the unit that the interpolant says (its own time, or a diffusion timestep). It returns a tensor of the shape of x.
        prediction: "velocity", "epsilon", "v" (diffusion v-prediction) or "x1" (the denoised sample).
        interpolant: the path of the training.
        condition: anything the network takes as a third argument. A tensor [batch, ..], or a mapping of such tensors, is one
            for each sample (labels, prompt embeddings), and follows the samples into parts of a batch; anything else is for
            all, and only passed on. Bind a new one for each batch with `bind`.
        autocast: the dtype in which the network is evaluated, torch.bfloat16 for mixed precision; None is its own. What it
            predicts comes back in the dtype of x.
        time_scale: what the network's time is multiplied with: 1000 for one that was trained with times from 0 to 1000. Its
            velocity is per unit of time before that: x_1 - x_0 on the linear path.
        time_direction: "data-to-noise" if time 0 was data when the network was trained, and time 1 (or `time_scale`) noise; its
            velocity then points to the noise: x_0 - x_1 on the linear path.

    Raises InputError, when made, for a prediction, scale or direction that there is not; when called, if the network returns
    anything but floats of the shape of x, or changes x; UserCodeError if it raises an exception.
    """

    network: Callable[..., Tensor]
    prediction: PredictionType = "velocity"
    interpolant: Interpolant = field(default_factory=Linear)
    condition: Any = None
    autocast: torch.dtype | None = None
    time_scale: float = 1.0
    time_direction: TimeDirection = "noise-to-data"

    def __post_init__(self) -> None:
        given: dict[str, Any] = vars(self)  # whatever the annotations say
        if not callable(given["network"]):
            raise InputError(f"Flow: the network must be callable as network(x, time), is {type(given['network']).__name__}")
        if isinstance(given["network"], type):
            raise InputError(f"Flow: the network is a class; give an instance, {given['network'].__name__}(..)")
        for name, kind in (("prediction", PredictionType), ("time_direction", TimeDirection)):
            if given[name] not in get_args(kind):
                raise InputError(f"Flow: there is no {name} {given[name]!r}{did_you_mean(str(given[name]), get_args(kind))}")
        path, scale = given["interpolant"], given["time_scale"]
        if not isinstance(path, Interpolant):
            hint = "an instance, such as Cosine()" if isinstance(path, type) else "one of tiltflow.flows.interpolant"
            raise InputError(f"Flow: interpolant must be {hint}, is {path!r}")
        if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise InputError(f"Flow: time_scale must be a number above 0, is {scale!r}")
        if isinstance(path, DiscreteVariancePreserving) and (scale != 1 or self._is_reversed):
            raise InputError("Flow: a discrete schedule has its own timesteps; leave time_scale and time_direction out")

    @property
    def _is_reversed(self) -> bool:
        return self.time_direction == "data-to-noise"

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity x1hat - x0hat at x on the linear path: with p = a x_1 + b x_0 the prediction and X = (alpha + beta) x
        the state in the interpolant's coordinates, v = (alpha + beta) ((a + b) x - p) / (alpha b - beta a) solves the
        2x2 system of `interpolant.convert`. Linear paths with velocity prediction reduce to v = p, exactly."""
        s = self.interpolant.own_time(t.double() if t.device.type == "cpu" else t)
        time = self.interpolant.network_time(s)
        if self._is_reversed:
            time = 1 - time
        time = (self.time_scale * time).to(x).expand(len(x))
        arguments = (time,) if self.condition is None else (time, self.condition)
        if isinstance(self.interpolant, Linear) and self.prediction == "velocity":
            v = self._predict(x, *arguments)
            return -v if self._is_reversed else v
        c = self.interpolant(interior(s))
        a, b = self._mixture_weights(c)
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
        return 1 / self._gain(c, *self._mixture_weights(c)).abs()

    def _mixture_weights(self, c: Coefficients) -> tuple[Tensor, Tensor]:
        a, b = mixture_weights(self.prediction, c)
        return (-a, -b) if self._is_reversed and self.prediction == "velocity" else (a, b)

    def _predict(self, x: Tensor, *arguments: Any) -> Tensor:
        handed = x if (dtype := self.dtype) is None else x.to(dtype)
        version = 0 if x.is_inference() else x._version
        try:
            with autocast(self.autocast, x.device):
                predicted: Any = self.network(handed, *arguments)
        except Exception as error:
            if passes_through(error):
                raise
            hint = "" if handed.dtype == x.dtype else "; its time comes in float32: does it need time.to(x.dtype)?"
            raise explanation(
                f"the network, called with {_described(handed, *arguments)},", error, self._order() or hint
            ) from error
        if not isinstance(predicted, Tensor) or predicted.shape != x.shape or not predicted.dtype.is_floating_point:
            raise InputError(f"the network must return floats of the shape of x, {list(x.shape)}{self._unlike(predicted, x)}")
        if not x.is_inference() and x._version != version:
            raise InputError("the network changes its argument x in place, as a first layer with inplace=True does")
        return predicted.to(x.dtype)

    def _order(self) -> str:
        """What is most likely wrong with the arguments of the network, going by their names; nothing if they look right."""
        network: Any = self.network
        try:
            names = list(inspect.signature(network.forward if isinstance(network, nn.Module) else network).parameters)
        except (TypeError, ValueError):
            return ""
        if names[:1] and names[0].lower() in TIMES:
            return f"; its arguments are ({', '.join(names)}): wrap it to be called as network(x, time)"
        return ""

    def _unlike(self, predicted: Any, x: Tensor) -> str:
        """In what a prediction differs from what it should be, and the likely cause."""
        if not isinstance(predicted, Tensor):
            return f", and returns {type(predicted).__name__}; wrap it to return the tensor in there"
        if predicted.shape == x.shape:
            return f", and returns {str(predicted.dtype).removeprefix('torch.')}"
        twice = x.ndim > 1 and predicted.ndim == x.ndim and predicted.shape[1] == 2 * x.shape[1]
        hint = "; are the other channels a variance (learn_sigma)? wrap it to return the first ones" if twice else ""
        return f", and returns {list(predicted.shape)}{self._order() or hint}"

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the weights of the network; None if it has none, or takes any."""
        if not isinstance(self.network, nn.Module) or isinstance(self.network, AnyFloats):
            return None
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), None)

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


def _described(*arguments: Any) -> str:
    """Shapes and dtypes of tensors.

    >>> _described(torch.zeros(2, 3), torch.zeros(2), "red")
    '[2, 3] float32, [2] float32, str'
    """
    return ", ".join(
        f"{list(a.shape)} {str(a.dtype).removeprefix('torch.')}" if isinstance(a, Tensor) else type(a).__name__
        for a in arguments
    )


def in_float32(flow: Flow) -> Flow:
    """`flow`, or if its weights are in 16 bits, with a copy of its network in float32: the small updates of a training would be
    lost in rounding."""
    if flow.dtype not in (torch.float16, torch.bfloat16):
        return flow
    return replace(flow, network=cast(nn.Module, copy.deepcopy(flow.network)).float())


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
