"""Schedulers of diffusers pipelines: the path that the model was trained on, and the times at which it is sampled.

The solver `euler` on these times draws what the pipeline itself draws if its scheduler takes the steps of deterministic DDIM,
or of Euler's method for flow matching: both are Euler's method on the linear path. Whether it does is measured, not looked up:
`Schedule.difference` runs the scheduler's own steps beside ours on a law whose prediction is known.
"""

# Mutation tests: test_schedules.py

from __future__ import annotations

import copy
import inspect
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tiltflow.errors import InputError, Note, did_you_mean
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import (
    DiscreteVariancePreserving,
    Interpolant,
    Linear,
    PredictionType,
    expand,
    interior,
    mixture_weights,
)
from tiltflow.samplers.grid import linear_clock
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.user_code import refused

PREDICTIONS: dict[str, PredictionType] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x1"}
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TOLERANCE = 1e-4
"""Largest difference between our sampler and the pipeline's own, relative to the largest latent, without a warning."""
ROUNDING = 5e-4
"""More than the rounding of timesteps in float32, less than the distance of UniPC's first one from a whole one."""


FIRST_ORDER: dict[str, dict[str, Any]] = {
    "DPMSolverMultistepScheduler": {"solver_order": 1, "algorithm_type": "dpmsolver++"},
    "DPMSolverSinglestepScheduler": {"solver_order": 1, "algorithm_type": "dpmsolver++"},
    "UniPCMultistepScheduler": {"solver_order": 1, "disable_corrector": list(range(1000))},
}
"""Settings by which schedulers of flow matching take steps of the first order, which are Euler's on the linear path."""


def is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler is for a flow-matching model."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler

    return isinstance(scheduler, (FlowMatchEulerDiscreteScheduler, SCMScheduler)) or (
        scheduler.config.get("prediction_type") == "flow_prediction" and bool(scheduler.config.get("use_flow_sigmas"))
    )


def path_of(scheduler: Any) -> tuple[Interpolant, PredictionType]:
    """Return the interpolant of a scheduler and the prediction type of its network. Raises InputError if they are not
    supported."""
    if is_flow(scheduler):
        return Linear(), "velocity"
    config, name = scheduler.config, type(scheduler).__name__
    if config.get("beta_schedule") not in SCHEDULES or config.get("trained_betas") is not None:
        known = f"beta_schedule {', '.join(SCHEDULES)}, or FlowMatchEulerDiscreteScheduler"
        raise InputError(f"scheduler {name}: its noise schedule is not supported; supported: {known}")
    if config.get("prediction_type", "epsilon") not in PREDICTIONS:
        known = f"{', '.join(PREDICTIONS)}, or flow_prediction with use_flow_sigmas"
        raise InputError(f"scheduler {name}: prediction_type {config.prediction_type!r} is not supported; supported: {known}")
    path = DiscreteVariancePreserving(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
    )
    return path, PREDICTIONS[config.get("prediction_type", "epsilon")]


@dataclass(frozen=True)
class Schedule:
    """The scheduler of a pipeline, on the linear path. Made by `schedule_of`.

    Args:
        own: the pipeline's scheduler.
        plain: a scheduler of diffusers that takes our steps on the same times, as far as there is one: the pipeline's own, that
            with steps of the first order, or DDIM with its settings. Exports include it.
        path: interpolant of the model.
        prediction: prediction type of its network.
        image_tokens: length of a picture as a sequence of tokens, for `use_dynamic_shifting`.
        sigmas: K -> sigmas [K] that the pipeline passes to its scheduler, or None if it passes none.
        shift: (image_tokens, K) -> mu of `use_dynamic_shifting`, or None if it is linear in the tokens.
    """

    own: Any
    plain: Any
    path: Interpolant
    prediction: PredictionType
    image_tokens: int = 0
    sigmas: Callable[[int], Tensor | None] | None = None
    shift: Callable[[int, int], float | None] | None = None

    def set_timesteps(self, scheduler: Any, num_inference_steps: int) -> None:
        """Set a scheduler's number of steps, as the pipeline does. Raises InputError if the scheduler refuses it."""
        config, options = scheduler.config, dict[str, Any]()
        if config.get("use_dynamic_shifting"):
            tokens = (config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096))
            shifts = (config.get("base_shift", 0.5), config.get("max_shift", 1.15))
            linear = shifts[0] + (self.image_tokens - tokens[0]) * (shifts[1] - shifts[0]) / (tokens[1] - tokens[0])
            own = None if self.shift is None else self.shift(self.image_tokens, num_inference_steps)
            options["mu"] = linear if own is None else own
        sigmas = None if self.sigmas is None or config.get("use_flow_sigmas") else self.sigmas(num_inference_steps)
        if type(scheduler).__name__ == "SCMScheduler" and num_inference_steps != 2:
            options["intermediate_timesteps"] = None
        if sigmas is None:
            options["num_inference_steps"] = num_inference_steps
        else:
            options["sigmas"] = sigmas.tolist()
        with refused(f"num_inference_steps {num_inference_steps}: {type(scheduler).__name__} refuses it"):
            scheduler.set_timesteps(**options)

    def times(self, num_inference_steps: int) -> Tensor:
        """Return the times [K + 1] of the scheduler on the linear path, from noise to data, float64. The last one is where the
        scheduler ends: at data, t = 1, or a little before.

        Each step goes to the next time. DDIMScheduler itself steps T / K timesteps further, which is another time where K does
        not divide T or the spacing is `linspace`.

        Raises InputError for a number of steps at which the times do not increase.
        """
        scheduler = copy.deepcopy(self.plain)
        self.set_timesteps(scheduler, num_inference_steps)
        if type(scheduler).__name__ == "SCMScheduler":
            times: Tensor = linear_time(scheduler.timesteps.double())
        elif isinstance(self.path, Linear):
            times = 1 - scheduler.sigmas.double()
        elif self.in_sigma:
            times = 1 / (1 + scheduler.sigmas.double())
        else:
            square = self.path.alphas_cumprod  # type: ignore[union-attr]
            # an offset can lead to timestep T, which does not exist: it would be read as clean data, and is refused below
            name = type(scheduler).__name__  # that of TCD ends at timestep 0 whatever its settings say
            to_data = name == "LCMScheduler" or (scheduler.config.set_alpha_to_one and name != "TCDScheduler")
            ends = square[-1] if to_data else square[-2]
            squares = torch.cat([square[len(square) - 2 - scheduler.timesteps.cpu()], ends[None]])
            times = squares.sqrt() / (squares.sqrt() + (1 - squares).sqrt())
        # the last step may have length 0: some schedulers end at the last timestep, and the grid of training continues to data
        if not bool((times[:-1].diff() > 0).all()) or times[-1] < times[-2]:
            raise InputError(
                f"num_inference_steps {num_inference_steps}: the times of {type(scheduler).__name__} do not all increase from"
                " noise to data; take fewer steps, or timestep_spacing: trailing"
            )
        return times

    def clock(self, times: Tensor, share: float) -> Tensor:
        """See `tiltflow.samplers.grid.Clock`: of models of diffusion in whole timesteps, rounded down."""
        if isinstance(self.path, Linear):
            return linear_clock(times, share)
        square = self.path.alphas_cumprod  # type: ignore[union-attr]
        known = square.sqrt() / (square.sqrt() + (1 - square).sqrt())  # of the last timestep, .., of timestep 0, of data
        left = len(known) - 2 - (known - times[:, None]).abs().argmin(1)
        nearer = ((1 - share) * left).floor().long()
        return torch.where(left < 0, times, known[len(known) - 2 - nearer])

    def called(self, predict: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a predictor, (.., time, condition) -> prediction, as the scheduler has it called: the multistep schedulers of
        diffusers cut the timesteps of flow matching to whole ones, though the state is that of the time between them."""
        if not isinstance(self.path, Linear) or self.own.config.get("prediction_type") != "flow_prediction":
            return predict
        count = self.own.config.num_train_timesteps

        def at_whole_timesteps(network: Any, x: Tensor, time: Tensor, condition: Any) -> Tensor:
            whole = (count * (1 - time) + ROUNDING).floor()
            return predict(network, x, 1 - whole / count, condition)

        return at_whole_timesteps

    @property
    def in_sigma(self) -> bool:
        """True if the scheduler's coordinates are x_1 + sigma x_0, as those of Euler's method for diffusion are."""
        from diffusers import EulerDiscreteScheduler

        return isinstance(self.plain, EulerDiscreteScheduler)

    def start_scale(self, t: Tensor) -> float:
        """Return the factor from the pipeline's starting latents, standard normal, to the linear path at the first time t."""
        if isinstance(self.path, Linear):
            return 1.0
        if self.in_sigma and self.plain.config.timestep_spacing != "leading":
            return 1 - t.item()
        return math.hypot(t.item(), 1 - t.item())

    def end_scale(self, t: Tensor) -> float:
        """Return the factor from the linear path at the last time t to the pipeline's latents."""
        if isinstance(self.path, Linear):
            return 1.0
        return 1 / (t.item() if self.in_sigma else math.hypot(t.item(), 1 - t.item()))

    def difference(self, num_inference_steps: int, scheduler: Any) -> float:
        """Return the difference between the latents that a scheduler draws in its own steps and those of our sampler: the
        largest absolute difference over the largest latent, on a normal law, whose prediction is known.

        Raises InputError if the scheduler cannot take such steps.
        """
        generator = stream(0, "schedule")
        noise, mean = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
        exact = partial(prediction_of_normal, mean=mean.double(), path=self.path, prediction=self.prediction)
        predict = partial(self.called(lambda network, x, time, condition: exact(x, time)), None, condition=None)
        times = self.times(num_inference_steps)
        flow, x = Flow(predict, self.prediction, self.path), noise * self.start_scale(times[0])
        euler = Sampling(solver="euler", num_inference_steps=num_inference_steps)
        ours = sample(flow, x, euler, generator, start=lambda _: times) * self.end_scale(times[-1])

        own = copy.deepcopy(scheduler)
        self.set_timesteps(own, num_inference_steps)
        try:
            with torch.random.fork_rng():  # some draw noise
                torch.manual_seed(0)
                theirs = drawn_by(own, predict, noise)
        except TypeError as error:  # step() takes other arguments
            raise InputError(
                f"scheduler {type(own).__name__}: its step() does not fit text-to-image pipelines ({error})"
            ) from None
        return ((ours - theirs).abs().max() / theirs.abs().max()).item()

    def warn_of_difference(self, num_inference_steps: int) -> None:
        """Warn if the pipeline's own scheduler draws other latents than our sampler, and name the settings that cause it."""
        try:
            apart = self.own_difference(num_inference_steps)
        except InputError:  # some schedulers need more steps than our sampler
            return
        if apart <= TOLERANCE:
            return
        kind, config, causes = type(self.own), dict(self.own.config), []
        for key, parameter in inspect.signature(kind.__init__).parameters.items():
            value = config.get(key)
            other = False if value is True else parameter.default
            if not isinstance(value, (bool, str)) or not isinstance(other, (bool, str)) or other == value:
                continue
            try:
                changed = replace(self, own=kind.from_config(config, **{key: other}))
                there = changed.own_difference(num_inference_steps)
            except Exception:  # the scheduler does not work without this setting
                continue
            if there <= TOLERANCE:
                causes.append(f"{key}: {str(value).lower() if isinstance(value, bool) else value}")
        why = f", because of {' or '.join(causes)}" if causes else ""
        warnings.warn(
            f"scheduler {kind.__name__}: at {num_inference_steps} steps it draws other latents than our sampler, by {apart:.2g}"
            f" of the largest on a normal law{why}; ours goes from each of {type(self.plain).__name__}'s times to the next"
            "; `scheduler: default` of a sampling point takes its own",
            Note,
            stacklevel=3,
        )

    def own_difference(self, num_inference_steps: int) -> float:
        """Return `difference` of the pipeline's own scheduler, computed once per configuration."""
        kind: Any = type(self.own)
        config = json.dumps(dict(self.own.config), sort_keys=True)
        return _difference(kind, config, self.image_tokens, self.sigmas, self.shift, num_inference_steps)


def schedule_of(
    scheduler: Any,
    image_tokens: int = 0,
    sigmas: Callable[[int], Tensor | None] | None = None,
    shift: Callable[[int, int], float | None] | None = None,
) -> Schedule:
    """Read the schedule of a scheduler; see `Schedule`. Raises InputError if its path is not supported."""
    from diffusers import (
        DDIMScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        LCMScheduler,
        SCMScheduler,
        TCDScheduler,
    )

    (path, prediction), config = path_of(scheduler), scheduler.config
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        plain = type(scheduler).from_config(config, stochastic_sampling=False)
    elif isinstance(scheduler, SCMScheduler):
        plain = scheduler
    elif isinstance(path, Linear):
        plain = type(scheduler).from_config(config, **FIRST_ORDER.get(type(scheduler).__name__, {}))
    elif isinstance(scheduler, EulerAncestralDiscreteScheduler):
        plain = EulerDiscreteScheduler.from_config(config)  # its times and coordinates, without its noise
    elif isinstance(scheduler, (EulerDiscreteScheduler, LCMScheduler, TCDScheduler)):
        plain = scheduler
    else:
        plain = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
    return Schedule(scheduler, plain, path, prediction, image_tokens, sigmas, shift)


@cache
def _difference(
    kind: Any,
    config: str,
    image_tokens: int,
    sigmas: Callable[[int], Tensor | None] | None,
    shift: Callable[[int, int], float | None] | None,
    num_inference_steps: int,
) -> float:
    """Return `Schedule.difference` of a scheduler of this class and configuration."""
    schedule = schedule_of(kind.from_config(json.loads(config)), image_tokens, sigmas, shift)
    return schedule.difference(num_inference_steps, schedule.own)


def prediction_of_normal(x: Tensor, time: Tensor, *, mean: Tensor, path: Interpolant, prediction: PredictionType) -> Tensor:
    """Return the exact prediction [batch, *event] for data N(mean, 1/4), called like the networks of pipelines.

    Args:
        x: [batch, *event], in the coordinates of the path.
        time: [] or [batch], in the network's unit.
    """
    time = time.double().expand(len(x))
    s = 1 - (time + 1) / path.num_train_timesteps if isinstance(path, DiscreteVariancePreserving) else time
    c = path(interior(s))
    weights = (*mixture_weights(prediction, c), c.alpha, c.beta)
    a, b, alpha, beta = (expand(weight, x.double()) for weight in weights)
    x1 = mean + alpha / 4 / (alpha**2 / 4 + beta**2) * (x.double() - alpha * mean)
    return (a * x1 + b * (x.double() - alpha * x1) / beta).to(x.dtype)


def drawn_by(scheduler: Any, predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, **options: Any) -> Tensor:
    """Draw latents from noise in a scheduler's own steps, as pipelines do; its timesteps must be set.

    Args:
        predict: (latents, time in the network's unit, []) -> prediction.
        options: further arguments of its steps.
    """
    if type(scheduler).__name__ == "SCMScheduler":
        return _drawn_by_angles(scheduler, predict, noise, **options)
    flow = is_flow(scheduler)
    x = noise if flow else noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        if flow:  # the time of the pipeline runs from data to noise, and so does its velocity
            predicted = -predict(x, 1 - t / scheduler.config.num_train_timesteps)
        else:
            predicted = predict(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(predicted, t, x, return_dict=False, **options)[0]
    return x


def _drawn_by_angles(scheduler: Any, predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, **options: Any) -> Tensor:
    """`drawn_by` of a scheduler whose latents are sigma_data (cos a x_1 + sin a x_0) at angles a. It takes x_1 to be cos a x -
    sin a F of a network F, which is here that of a velocity on the linear path."""
    deviation: float = scheduler.config.sigma_data
    x = noise * deviation
    for a in scheduler.timesteps[:-1]:
        linear, t = x / (a.cos() + a.sin()), linear_time(a)
        sample = linear + (1 - t) * deviation * predict(linear / deviation, t)
        x = scheduler.step((a.cos() * x - sample) / a.sin(), a, x, return_dict=False, **options)[0]
    return x / deviation


def linear_time(angle: Tensor) -> Tensor:
    """The time on the linear path of angles from data, 0, to noise, pi / 2, and a little beyond."""
    return (angle.cos() / (angle.cos() + angle.sin())).clamp(min=0)


def scheduler_named(name: str, default: Any) -> Any:
    """Return the scheduler `default`, or one of another class of diffusers with its settings.

    Raises InputError if diffusers has no such scheduler, or it does not fit the model.
    """
    import diffusers

    if name == "default":
        return default
    kind = getattr(diffusers, name, None) if name in (known := _schedulers()) else None
    if kind is None:
        raise InputError(f"scheduler: diffusers has no {name!r}{did_you_mean(name, known)}")
    with refused(f"scheduler {name}: cannot be made of the settings of {type(default).__name__}"):
        scheduler = kind.from_config(default.config)
    if path_of(scheduler) != path_of(default):
        raise InputError(f"scheduler {name}: is not for a model of {type(default).__name__}")
    return scheduler


@cache
def _schedulers() -> tuple[str, ...]:
    """Return the names of diffusers' schedulers."""
    import diffusers

    return tuple(name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax"))
