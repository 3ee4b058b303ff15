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
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from tiltflow.errors import InputError, did_you_mean
from tiltflow.flows import conditions
from tiltflow.flows.field import VelocityField, Which
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
"""Names under which networks take their time."""


FIRST = 0.0063
"""Linear time of the first step with a predicted noise on a path whose noise end is exact: that of DDPM's last timestep."""


class AnyFloats(nn.Module):
    """A network that takes samples of any float dtype, whatever that of its weights, and predicts in theirs."""


@dataclass(frozen=True)
class Flow(VelocityField):
    """A network, what it predicts and the interpolant it was trained on: together a velocity field on the linear path.

    Args:
        network: called as network(x, time) or, with a condition, network(x, time, condition); x is [batch, *event] in
            the interpolant's own coordinates and in the dtype of the network's weights, time is [batch], float32 or better, in
            the unit that the interpolant says (its own time, or a diffusion timestep). It returns a tensor of the shape of x.
        prediction: "velocity", "epsilon", "v" (diffusion v-prediction) or "x1" (the denoised sample).
        interpolant: the path of the training.
        condition: anything that the network takes as a third argument, such as labels or prompt embeddings; what follows its
            samples into parts of a batch, `tiltflow.flows.conditions` says. Bind a new one for each batch with `bind`.
        autocast: the dtype in which the network is evaluated, torch.bfloat16 for mixed precision; None is its own. What it
            predicts comes back in the dtype of x.
        time_scale: what the network's time is multiplied with: 1000 for one that was trained with times from 0 to 1000, and
            1 / 1000 for one that knows timestep i of a discrete schedule as i / 1000. Its velocity is per unit of time before
            that: x_1 - x_0 on the linear path.
        time_direction: "data-to-noise" if time 0 was data when the network was trained, and time 1 (or `time_scale`) noise; its
            velocity then points to the noise: x_0 - x_1 on the linear path.
        projection: called as projection(noise, condition), the orthogonal projection P of states whose noise is N(0, P), such
            as padded ones; what the network returns must lie in its range.

    Raises InputError, when made, for an unknown prediction, scale or direction; when called, if the network returns anything
    but floats of the shape of x, or changes x; UserCodeError if it raises an exception.
    """

    network: Callable[..., Tensor]
    prediction: PredictionType = "velocity"
    interpolant: Interpolant = field(default_factory=Linear)
    condition: Any = None
    autocast: torch.dtype | None = None
    time_scale: float = 1.0
    time_direction: TimeDirection = "noise-to-data"
    projection: Callable[[Tensor, Any], Tensor] | None = None

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
        if isinstance(path, DiscreteVariancePreserving) and self._is_reversed:
            raise InputError("Flow: a discrete schedule has its own timesteps; leave time_direction out")

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
        """Change of the network's prediction for a change of velocity by 1, at t [] or [batch]: 1 for velocities on
        the linear path, t for epsilon there, 1 - t for x1."""
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
        """The likely mistake in the order of the network's arguments, judged by their names; "" if they look right."""
        network: Any = self.network
        try:
            names = list(inspect.signature(network.forward if isinstance(network, nn.Module) else network).parameters)
        except (TypeError, ValueError):
            return ""
        if names[:1] and names[0].lower() in TIMES:
            return f"; its arguments are ({', '.join(names)}): wrap it to be called as network(x, time)"
        return ""

    def _unlike(self, predicted: Any, x: Tensor) -> str:
        """Differences of a prediction from floats of the shape of x, and the likely cause."""
        if not isinstance(predicted, Tensor):
            named = predicted if isinstance(predicted, Mapping) else {}
            held = next((f"its {name}" for name, value in named.items() if isinstance(value, Tensor)), "the tensor in there")
            return f", and returns {type(predicted).__name__}; wrap it to return {held}"
        if predicted.shape == x.shape:
            return f", and returns {str(predicted.dtype).removeprefix('torch.')}"
        twice = x.ndim > 1 and predicted.ndim == x.ndim and predicted.shape[1] == 2 * x.shape[1]
        hint = "; are the other channels a variance (learn_sigma)? wrap it to return the first ones" if twice else ""
        return f", and returns {list(predicted.shape)}{self._order() or hint}"

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the network's weights; None if it has none, or takes samples of any."""
        if not isinstance(self.network, nn.Module) or isinstance(self.network, AnyFloats):
            return None
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), None)

    def bind(self, condition: Any) -> Flow:
        return replace(self, condition=condition)

    def project(self, noise: Tensor) -> Tensor:
        return noise if self.projection is None else self.projection(noise, self.condition)

    def select(self, which: Which) -> Flow:
        return self.bind(conditions.select(self.condition, which))

    def groups(self, count: int, device: torch.device) -> list[Tensor]:
        return conditions.groups(self.condition, count, device)

    def name_of(self, which: int) -> str:
        return conditions.name_of(self.condition, which)

    @property
    def noise_time(self) -> float:
        """The linear time at which the network's noise end sits: 0, or a little more for a diffusion schedule whose
        last timestep still holds some signal, and for noise that is predicted. Sampling starts there, from pure noise."""
        end = float(linear_time(self.interpolant, torch.zeros((), dtype=torch.float64)))
        # the data are what is left of x without the noise, over alpha: where that is 0, any error of the network has no bound
        return end or (FIRST if self.prediction == "epsilon" else end)

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
