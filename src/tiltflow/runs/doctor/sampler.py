"""Checks of the sampler: do samples forget their starting noise, and are they those of the pipeline's own scheduler."""

# Mutation tests: none: thresholds, and words for them

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from tiltflow.models.denoiser import floating_dtype
from tiltflow.models.schedules import TOLERANCE
from tiltflow.models.text_to_image import TextToImage
from tiltflow.pictures import IMAGE
from tiltflow.runs.doctor.patient import Finding, Patient
from tiltflow.samplers.rollout import rollout
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream

STEPS = 4
"""Steps in which a picture is drawn by both samplers."""


def memoryless(patient: Patient) -> Iterator[Finding]:
    """Check that samples do not depend on their starting noise: the correlation of both over trajectories of the base."""
    sampling, caveats = patient.method.sampling, patient.target.caveats
    if not sampling.has_noise:
        if caveats:
            yield Finding("target", "amber", " ".join(caveats), "docs/mathematics.md says what it aims at instead")
        return
    x, chain = patient.batch.x[patient.few], sampling.chain(patient.start)
    with torch.no_grad():
        flow = patient.bound(patient.base)
        end = rollout(chain, flow, x, stream(1, "doctor", device=x.device), to_the_end=True).states[-1]
    start, end = x.flatten(1).double(), end.flatten(1).double()
    centred = end - end.mean(0)
    products = (start * centred).mean(1) / (start.square().mean().sqrt() * centred.square().mean().sqrt())
    correlation, error = products.mean().item(), (products.std() / len(products) ** 0.5).item()
    text = f"correlation of noise and sample {correlation:.3f} ± {error:.2g}"
    if abs(correlation) > max(4 * error, 0.02) or caveats:
        fix = "solver memoryless forgets its start; a scheduler with timestep_spacing trailing starts from pure noise"
        yield Finding("memorylessness", "amber", f"{text}. {' '.join(caveats)}".strip(), fix)
    else:
        yield Finding("memorylessness", "green", text)


def parity(patient: Patient) -> Iterator[Finding]:
    """Compare our sampler with the pipeline's own: from the same latents, at the model's guidance scale, before the decoder."""
    model = patient.model
    if not isinstance(model, TextToImage):
        return
    if (error := difference_to_pipeline(model)) is None:
        text = "not compared: the pipeline's own call does not take text encoders in another dtype than the denoiser"
        yield Finding("parity", "green", text)
        return
    samplings = [patient.method.sampling, *(point.sampling for point in patient.recipe.evaluation.points or ())]
    asked = {
        sampling.num_inference_steps for sampling in samplings if sampling.solver == "euler" and sampling.scheduler is None
    }
    steps = {count: apart for count in sorted(asked) if (apart := model.schedule.own_difference(count)) > TOLERANCE}
    if steps or error > (1e-3 if floating_dtype(model.denoiser.network) == torch.float32 else 0.02):
        fix = "we take our own steps at the scheduler's times; an export comes with a scheduler that takes them too"
        text = f"our pictures differ from the pipeline's by {error:.2g} of the range -1 to 1 at {STEPS} steps"
        for count, apart in steps.items():
            text += f", and its latents from the scheduler's own by {apart:.2g} of the largest at {count}"
        yield Finding("parity", "amber", text, fix)
    else:
        yield Finding("parity", "green", f"our sampler draws the pipeline's own pictures, to {error:.1e}")


def difference_to_pipeline(model: TextToImage) -> float | None:
    """The mean absolute difference, in pixels in [-1, 1], of a picture by our sampler and by the pipeline; None if it draws
    none, its components being in several dtypes."""
    item = model.example
    latents = torch.randn((1, *model.event_shape), generator=stream(0, "parity", device=model.device), device=model.device)
    with torch.no_grad(), model.encoder.encoders.whole() as pipeline:
        dtype = floating_dtype(model.denoiser.network)
        if any(floating_dtype(part) != dtype for part in model.encoder.encoders.parts.values()):
            return None
        pictures = model.pictures_of([item])
        sampling = Sampling(solver="euler", num_inference_steps=STEPS)
        ours = model.sample([item.text], latents=latents, sampling=sampling, images=pictures or None)
        drawn = pipeline(
            prompt=item.text,
            num_inference_steps=STEPS,
            latents=latents.to(dtype),
            output_type="latent",
            return_dict=False,
            **model.size_options,
            **model.family.arguments(model.size, STEPS),
            **({IMAGE: pictures[0].open()} if pictures else {}),
            **model.family.guided_by(model.guidance_scale),
            **model.encoding,
        )[0]
        theirs = model.decode(model.family.returned(model.pipeline, cast(Tensor, drawn).to(latents), model.size)).cpu()
    return (ours.clamp(-1, 1) - theirs.clamp(-1, 1)).abs().mean().item()
