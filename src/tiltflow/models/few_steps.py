"""Pipelines that were distilled to few steps, such as LCM, Turbo and Lightning: what shows it, and what is known of them."""

from __future__ import annotations

from typing import Any

from tiltflow.models.pipelines import Family
from tiltflow.samplers.sampling import Sampling

FEW = 8
"""Most steps that models distilled to few are published for."""
OWN_SAMPLING: dict[str, Sampling] = {
    "EulerAncestralDiscreteScheduler": Sampling(solver="ddpm", num_inference_steps=4),  # the same steps, in other coordinates
    "LCMScheduler": Sampling(solver="consistency", num_inference_steps=4),
    "TCDScheduler": Sampling(solver="tcd", eta=0.3, num_inference_steps=4),
    "SCMScheduler": Sampling(solver="consistency", num_inference_steps=2),
}
"""The solver that draws as a scheduler for few steps does, and a usual number of steps."""


def sign_of_few_steps(pipeline: Any, family: Family) -> str | None:
    """What shows that a pipeline was distilled to few steps, by its scheduler and its networks; None if nothing does."""
    scheduler = pipeline.scheduler
    name, config = type(scheduler).__name__, scheduler.config
    if name in ("LCMScheduler", "SCMScheduler", "TCDScheduler"):
        return name
    if name == "EulerAncestralDiscreteScheduler" and config.timestep_spacing == "trailing":
        return f"{name} with timestep_spacing: trailing"
    if getattr(pipeline, family.denoiser).config.get("time_cond_proj_dim") is not None:
        return "time_cond_proj_dim"
    if family.is_distilled(pipeline) and not family.guidance_is_input(pipeline):
        return f"a {type(pipeline).__name__} without guidance"
    return None


def own_sampling(pipeline: Any, family: Family) -> Sampling | None:
    """The sampling of a pipeline whose scheduler is for few steps; None of any other."""
    return None if sign_of_few_steps(pipeline, family) is None else OWN_SAMPLING.get(type(pipeline.scheduler).__name__)


def few_steps_in_words(pipeline: Any, family: Family, guidance_scale: float, sampling: Sampling) -> list[str]:
    """What is known of a tilt of a model that was distilled to few steps: one sentence, if this seems to be one.

    Args:
        guidance_scale: the model's own.
        sampling: with which it is trained.
    """
    sign, model, steps = sign_of_few_steps(pipeline, family), "this model was", sampling.num_inference_steps
    trailing = pipeline.scheduler.config.get("timestep_spacing") == "trailing"
    if sign is None and trailing and guidance_scale <= 1 and steps <= FEW:
        sign, model = f"timestep_spacing: trailing, {steps} steps and no guidance", "if this model was"
    if sign is None:
        return []
    return [
        f"{sign}: {model} distilled to few steps, it has no velocity field whose ODE or SDE samples its law, and the law that"
        f" is tilted is the one that the solver {sampling.solver} makes in {steps} step{'' if steps == 1 else 's'}."
    ]
