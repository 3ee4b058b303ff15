"""Distances of pictures to reference pictures, for each sampling point; computed by `evaluation.features`."""

from __future__ import annotations

from torch import Tensor

from tiltflow.data import load_images
from tiltflow.errors import InputError
from tiltflow.evaluation.metrics import Cost, Metric, nothing

METRICS = (
    Metric(
        "fid",
        "FID to the reference",
        "Fréchet distance between Gaussian fits to the features of the pictures and of the reference.",
        better="down",
        short="FID",
        source="table",
        compared=True,
        cost=Cost("fid_base", "the base's own"),
    ),
    Metric(
        "kid",
        "KID to the reference",
        "Unbiased squared maximum mean discrepancy between the features of the pictures and of the reference.",
        better="down",
        short="KID",
        source="table",
        compared=True,
    ),
    Metric(
        "fid_per_prompt",
        "FID of a prompt to the base",
        "Mean over prompts of the Fréchet distance between the features of its pictures and of fresh ones of the base. That of"
        " the base itself is the bias of so few pictures.",
        better="down",
        short="FID of a prompt",
        source="table",
        compared=True,
    ),
)

measure = nothing


def reference_images(path: str, like: Tensor) -> Tensor:
    """Load up to 10,000 pictures [n, channels, height, width]; a single channel is repeated to those of `like`.

    Raises InputError if they cannot be read, and for videos, whose features are means over frames.
    """
    if like.ndim == 5:
        raise InputError("evaluation.reference: samples are videos, to which only those of the base compare; set base")
    images = load_images(path, "test").images[:10_000]
    return images.expand(-1, like.shape[1], -1, -1) if images.shape[1] == 1 and like.ndim == 4 else images
