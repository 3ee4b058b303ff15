"""Flow: a pretrained network seen as a velocity field, whatever it predicts and on whatever Gaussian path it was trained.

A sampler or a method sees a function (x, t) -> v on the linear path of `tiltflow.interpolant`: x is [batch, *event],
t is [] or [batch] in [0, 1] from noise to data, v has the shape of x. Nothing downstream knows about epsilon-prediction,
discrete timesteps or prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Flow:
    """A network, what it predicts and the interpolant it was trained on: together a velocity field on the linear path.

    Args:
        network: called as network(x, time) or, with a condition, network(x, time, condition); x is [batch, *event] in
            the interpolant's own coordinates, time is [batch] in the unit that the interpolant says (its own time, or
            a diffusion timestep).
        prediction: "velocity", "epsilon", "v" (diffusion v-prediction) or "x1" (the denoised sample).
        interpolant: the path of the training.
        condition: anything the network takes as a third argument. A tensor [batch, ..] is one for each sample (labels, prompt
            embeddings), and follows the samples into parts of a batch; anything else is for all, and only passed on. Bind a
            new one for each batch with `bind`.
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

    @property
    def noise_time(self) -> float:
        """The linear time at which the network's noise end sits: 0, or a little more for a diffusion schedule whose
        last timestep still holds some signal. Sampling starts there, from pure noise."""
        return float(linear_time(self.interpolant, torch.zeros((), dtype=torch.float64)))

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters of the network."""
        network = cast(nn.Module, self.network)
        return (p for p in network.parameters() if p.requires_grad)


@dataclass(frozen=True)
class AdapterOff:
    """The base flow of an adapter fine-tune: the same network with its adapter switched off, so no second copy.

    `flow.network` must have peft's `disable_adapter()`. Merged adapters cannot be switched.
    """

    flow: Flow

    def disabled(self) -> AbstractContextManager[None]:
        return cast(Any, self.flow.network).disable_adapter()  # type: ignore[no-any-return]

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        with self.disabled():
            return self.flow(x, t)


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

    def switch() -> AbstractContextManager[None]:
        return flow.disabled() if isinstance(flow, AdapterOff) else nullcontext()

    field = flow.flow if isinstance(flow, AdapterOff) else flow
    x = x.detach().requires_grad_()
    with switch(), torch.enable_grad():
        v = field(x, t)

    def pullback(cotangent: Tensor) -> Tensor:
        with switch():
            (product,) = torch.autograd.grad(v, x, cotangent)
        return product

    return v.detach(), pullback


def rows(flow: VelocityField, which: Tensor | slice) -> VelocityField:
    """`flow` for those samples of the batch: given their conditions, where it was bound to a tensor of one for each sample."""
    if isinstance(flow, Flow):
        condition = flow.condition
        return flow.bind(condition[which]) if isinstance(condition, Tensor) and condition.ndim > 0 else flow
    inner = getattr(flow, "flow", None)
    return flow if inner is None else replace(cast(Any, flow), flow=rows(inner, which))


@dataclass(frozen=True)
class Chunked:
    """A velocity field that is evaluated on at most `size` samples at a time."""

    flow: VelocityField
    size: int

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        starts = range(0, len(x), self.size)
        return torch.cat([rows(self.flow, slice(i, i + self.size))(x[i : i + self.size], t) for i in starts])


def in_chunks(flow: VelocityField, size: int | None) -> VelocityField:
    """`flow`, evaluated on at most `size` samples at a time: less memory, the same result."""
    return flow if size is None else Chunked(flow, size)


class CountEvaluations:
    """Counts how many samples networks are evaluated on, while it is the context: `with CountEvaluations(network) as count`."""

    def __init__(self, *networks: object):
        self.networks = {id(network): network for network in networks if isinstance(network, nn.Module)}
        self.total = 0

    def __enter__(self) -> CountEvaluations:
        self.hooks = [network.register_forward_pre_hook(self._count) for network in self.networks.values()]
        return self

    def _count(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.total += len(arguments[0])

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
