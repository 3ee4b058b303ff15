"""What the scheduler of a diffusers pipeline says: the path that the model was trained on, and the times it is sampled at."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.interpolant import DiscreteVariancePreserving, Interpolant, Linear, PredictionType

PREDICTIONS: dict[str, PredictionType] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x1"}
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
OTHER_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def is_flow(scheduler: Any) -> bool:
    """Whether the scheduler is one of flow matching."""
    return type(scheduler).__name__.startswith("FlowMatch")


def path_of(scheduler: Any) -> tuple[Interpolant, PredictionType]:
    """The interpolant of a scheduler, and what its network predicts. Raises InputError if they are none of tiltflow's."""
    if is_flow(scheduler):
        return Linear(), "velocity"
    config = scheduler.config
    if config.get("beta_schedule") not in SCHEDULES or config.get("trained_betas") is not None:
        known = f"beta_schedule {', '.join(SCHEDULES)}, or a FlowMatch scheduler"
        raise InputError(f"scheduler {type(scheduler).__name__}: its noise schedule is not known here; known: {known}")
    if config.get("prediction_type", "epsilon") not in PREDICTIONS:
        raise InputError(f"scheduler: prediction_type {config.prediction_type!r} is not known; known: {', '.join(PREDICTIONS)}")
    path = DiscreteVariancePreserving(
        num_train_timesteps=config.num_train_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.beta_schedule,
        rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
    )
    return path, PREDICTIONS[config.get("prediction_type", "epsilon")]


def diffusion_grid(scheduler: Any) -> Callable[[int], Tensor]:
    """num_inference_steps -> linear times [K + 1] at the timesteps of a diffusion scheduler, by its spacing; the last one is
    where the scheduler ends: at data, or at the first timestep (`set_alpha_to_one`).

    With the spacing `linspace` each step goes to the next of these timesteps; DDIMScheduler itself steps T / K further, to
    times that are not its own.
    """
    from diffusers import DDIMScheduler

    if asked := [key for key in OTHER_GRIDS if scheduler.config.get(key)]:
        warnings.warn(f"scheduler: {asked[0]} is left out; the timesteps are those of its timestep_spacing", stacklevel=2)
    plain = DDIMScheduler.from_config(scheduler.config)
    square = path_of(scheduler)[0].alphas_cumprod  # type: ignore[union-attr]

    def grid(num_inference_steps: int) -> Tensor:
        plain.set_timesteps(num_inference_steps)
        last = plain.config.num_train_timesteps - 1
        squares = [square[last - i] for i in plain.timesteps.tolist()]
        end = square[-1] if plain.config.set_alpha_to_one else square[-2]
        alpha, beta = torch.stack([*squares, end]).sqrt(), (1 - torch.stack([*squares, end])).sqrt()
        return alpha / (alpha + beta)

    return grid


def flow_grid(scheduler: Any, image_tokens: int, sigmas: Callable[[int], Tensor] | None = None) -> Callable[[int], Tensor]:
    """num_inference_steps -> linear times [K + 1] of a flow-matching scheduler, shifted as it says.

    Args:
        image_tokens: how long a picture is as a sequence, for `use_dynamic_shifting`.
        sigmas: K -> [K], where a pipeline asks for others than the scheduler's own.
    """
    own, config = copy.deepcopy(scheduler), scheduler.config
    options = {}
    if config.get("use_dynamic_shifting"):
        tokens = (config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096))
        shifts = (config.get("base_shift", 0.5), config.get("max_shift", 1.15))
        options["mu"] = shifts[0] + (image_tokens - tokens[0]) * (shifts[1] - shifts[0]) / (tokens[1] - tokens[0])

    def grid(num_inference_steps: int) -> Tensor:
        if sigmas is None or config.get("use_flow_sigmas"):
            own.set_timesteps(num_inference_steps, **options)
        else:
            own.set_timesteps(sigmas=sigmas(num_inference_steps).tolist(), **options)
        times: Tensor = 1 - own.sigmas.double()
        return times

    return grid


def starting_scale(path: Interpolant, t: Tensor) -> float:
    """What standard normal noise in the coordinates of a path is multiplied with on the linear path, at linear time t []."""
    if isinstance(path, Linear):
        return 1.0
    return math.hypot(t.item(), 1 - t.item())
