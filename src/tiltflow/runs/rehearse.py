"""Try, before the first step, all that a run will need of others: rewards, solvers, judges and features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.evaluation.features import distances_to_reference, features_of
from tiltflow.evaluation.metrics.distance_to_reference import reference_images
from tiltflow.evaluation.metrics.judge import real_images
from tiltflow.evaluation.metrics.molecules import known_smiles
from tiltflow.evaluation.molecules import are_molecules
from tiltflow.evaluation.samples import Asked, Instruments, Judge, with_latents
from tiltflow.evaluation.settings import Evaluation, Point
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.text_to_image import TextToImage
from tiltflow.rewards.functions.checked import try_reward
from tiltflow.rewards.functions.latents import decoded_from, seen_by
from tiltflow.training.draw import Decoded
from tiltflow.training.method import Method
from tiltflow.user_code import tried

ROUGH = 4
"""Steps, at most, in which pictures are drawn to try what looks at them; some schedulers take no fewer."""


def two_samples(
    model: GenerativeModel, item: Item, point: Point, instruments: Instruments, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Two samples [2, *sample_shape] of an item, and their latents if a reward looks at them. Those of a model with a decoder
    are drawn in few steps."""
    sampling = point.sampling
    if model.has_decoder:
        sampling = sampling.model_copy(update={"num_inference_steps": min(ROUGH, sampling.num_inference_steps)})
    options = {"seed": seed, "sampling": sampling, "guidance_scale": point.guidance_scale}
    return with_latents(instruments.rewards.values(), model, [item, item], **options)


def rehearse(
    model: GenerativeModel,
    item: Item,
    asked: Asked,
    instruments: Instruments,
    method: Method,
    settings: Evaluation,
    seed: int,
) -> None:
    """Try on two samples of an item, drawn in each way to sample, all that the training and the evaluation will need of others.

    Rewards need not be finite for pictures that are drawn in few steps: a detector may see nothing in them.

    Raises InputError, of one line, for what does not work.
    """
    points: Sequence[Point] = settings.points or ()
    x, latents = torch.zeros(0), None
    with tried("method"):
        method.sampling.times(model.grid)
    for i, point in reversed(list(enumerate(points))):
        with tried("" if len(points) == 1 and not model.has_decoder else f"evaluation.points[{i}]"):
            if point.scheduler is not None and isinstance(model, TextToImage):
                model.scheduler(point.sampling)
            else:
                point.sampling.times(model.own_grid)
            x, latents = two_samples(model, item, point, instruments, seed)
    x = x.to(instruments.device)
    non_finite = "drop" if model.has_decoder else instruments.non_finite
    two = Asked((item, item), ("",), asked.kind)
    for name, reward in instruments.rewards.items():
        if name == instruments.own:
            own, seen = two.tell(reward), x
            if latents is not None and "latents" in seen_by(reward):  # as training sees it, gradient and all
                own, seen = Decoded(model, own, 1), latents.to(instruments.device)
            try_reward(own, seen, gradient=method.needs.reward_gradient, non_finite=non_finite)
        else:
            with tried(f"evaluation.rewards {name}"):
                try_reward(decoded_from(two.tell(reward), latents), x, non_finite=non_finite)
    if instruments.judge is not None:
        try_judge(instruments.judge, x, settings, instruments.device)
    elif are_molecules(x):
        known_smiles(settings)
    elif settings.data is not None:
        raise InputError("evaluation.data: the comparison is in the features of a judge; set evaluation.judge too")
    if instruments.extract is not None:
        with tried():
            found = features_of(x, instruments.extract, instruments.batch_size, instruments.device)
            if settings.reference is not None:
                real = x if settings.reference == "base" else reference_images(settings.reference, x)[:2]
                theirs = features_of(real, instruments.extract, instruments.batch_size, instruments.device)
                distances_to_reference(found, theirs)


def try_judge(judge: Judge, x: Tensor, settings: Evaluation, device: str) -> None:
    """Raise InputError if the judge does not take these samples, or the real images that they are compared with."""
    seen = {"samples": x}
    if settings.data is not None:
        seen["evaluation.data"] = real_images(settings.data)[:2].to(device)
    for name, images in seen.items():
        try:
            with torch.no_grad():
                judge.probabilities(images)
                judge.features(images)
        except RuntimeError as error:  # torch's word for a wrong shape
            raise InputError(
                f"evaluation.judge does not take {name} of shape {list(images.shape[1:])}: {str(error).splitlines()[0]}"
            ) from None
