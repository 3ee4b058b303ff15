"""The table of an evaluation: one row for each sampling point and each of the two models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltflow.evaluation.features import distances_to_reference, frechet_distances
from tiltflow.evaluation.metrics.distance_to_reference import reference_images
from tiltflow.evaluation.metrics.diversity import diversity, squared_distance
from tiltflow.evaluation.molecules import are_molecules, plain
from tiltflow.evaluation.monitor import over_groups
from tiltflow.evaluation.samples import Asked, Instruments
from tiltflow.evaluation.settings import Evaluation, Point
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.text_to_image import TextToImage
from tiltflow.streams import stream

OF_POINT = ("model", "solver", "num_inference_steps", "shift", "spacing", "eta", "guidance_scale")
"""Columns of the table that say what was sampled, and how; all others are numbers that were measured."""


@dataclass(frozen=True)
class Drawn:
    """Samples of a model at one sampling point, their rewards by name, and how many of each could not be computed."""

    x: Tensor
    rewards: dict[str, Tensor]
    failed: dict[str, int]


BaseSamples = dict[int, tuple[Tensor, Tensor | None]]
"""Samples of the base and their latents, by the number of the sampling point."""


def draw_all(
    settings: Evaluation,
    base: GenerativeModel,
    tuned: GenerativeModel,
    asked: Asked,
    instruments: Instruments,
    *,
    seed: int,
    base_samples: BaseSamples | None = None,
) -> tuple[list[dict[str, Any]], tuple[Drawn, Drawn]]:
    """Return one row for each sampling point and each of the two models, and the samples of both at the first point.

    Args:
        base_samples: those that an earlier call drew of the same base, for the same items and points with the same seed, which
            are used again; filled where it has none.
    """
    points, reference = settings.points or (), reference_features(settings, base, asked, instruments, seed)
    table, first = list[dict[str, Any]](), list[Drawn]()
    for i, point in enumerate(points):
        scale = None
        for name, model in (("base", base), ("tuned", tuned)):
            known = None if base_samples is None or name == "tuned" else base_samples.get(i)
            if known is not None and known[1] is None and instruments.see_latents:
                known = None  # it was drawn for rewards that do not
            x, latents = known or instruments.draw(model, asked.items, point, seed=seed, batch_size=settings.at_once)
            if base_samples is not None and name == "base":
                base_samples[i] = x, latents
            rewards, failed = instruments.scored(x, asked, latents)
            extract = instruments.extract
            compared = plain(x, clamped=base.has_decoder) if extract is None else instruments.features(x, extract)
            if scale is None:  # of the base, which comes first
                scale = squared_distance(compared, asked.size)
            row: dict[str, Any] = {"model": name, **in_row(point, points, base)}
            for key, value in rewards.items():
                row |= over_groups(value, asked.together).named(key)
            row |= diversity(compared, asked, scale if extract is None else None)
            if reference is not None:
                row |= distances_to_reference(compared, reference, seed)
                if settings.reference == "base" and asked.kind == "prompt" and asked.groups > 1:  # of one, it is the FID
                    row |= of_prompts(compared, reference, asked)
            table.append(row)
            if i == 0:
                first.append(Drawn(x, rewards, failed))
    return table, (first[0], first[1])


def drawn(model: GenerativeModel, asked: Asked, point: Point, seed: int, batch_size: int) -> Tensor:
    """Draw a sample of each item at a sampling point."""
    return model.draw(
        asked.items, seed=seed, sampling=point.sampling, guidance_scale=point.guidance_scale, batch_size=batch_size
    )


def in_row(point: Point, points: Sequence[Point], model: GenerativeModel) -> dict[str, Any]:
    """Return a sampling point as columns of the table; shift, spacing and eta only if they differ between the points."""
    values = point.model_dump(include={"solver", "num_inference_steps"})
    if point.scheduler is not None and isinstance(model, TextToImage):
        values["solver"] = type(model.scheduler(point.sampling)[0]).__name__
    values |= {
        name: getattr(point, name) for name in ("shift", "spacing", "eta") if len({getattr(each, name) for each in points}) > 1
    }
    if model.prompted and model.has_decoder:
        values["guidance_scale"] = model.guidance_scale if point.guidance_scale is None else point.guidance_scale
    return values


def reference_features(
    settings: Evaluation, base: GenerativeModel, asked: Asked, instruments: Instruments, seed: int
) -> Tensor | None:
    """Return the features [n, width] of the reference pictures of FID and KID, if there are any. Those of the base are drawn
    from other noise than the samples in the table, so that the base's own distance is the floor."""
    extract = instruments.extract
    if settings.reference is None or extract is None:
        return None
    if settings.reference == "base":
        other = stream(seed, "reference").initial_seed()
        return instruments.features(drawn(base, asked, settings.first, other, settings.at_once), extract)
    shape = torch.zeros(1, *base.sample_shape)
    return instruments.features(reference_images(settings.reference, shape), extract)


def of_prompts(features: Tensor, reference: Tensor, asked: Asked) -> dict[str, float]:
    """Return the mean over prompts of the Fréchet distance between the features of its pictures and those of its reference
    pictures, and its standard error over prompts."""
    x, y = (each.reshape(asked.groups, asked.size, -1) for each in (features, reference))
    return over_groups(frechet_distances(x, y), 1).named("fid_per_prompt")


def in_words(instruments: Instruments, features: str | None, base: GenerativeModel, x: Tensor) -> str:
    """Name what samples x [n, *event] of the base are compared in for diversity."""
    if instruments.extract is not None:
        return f"features of {features}"
    if are_molecules(x):
        return "fingerprints of their bonds"
    return "pixels" if base.has_decoder else "the samples themselves"
