"""Features of pictures, and distances between sets of pictures in them: Fréchet distance (FID) and KID, by torchmetrics."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import in_batches
from tiltflow.plugins import import_function
from tiltflow.rewards.backbones.clip import Clip
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.streams import stream
from tiltflow.user_code import explained

MOST_KID = 1000
"""Size of the subsets of KID, as in arXiv 1801.01401."""

Features = Callable[[Tensor], Tensor]
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def feature_extractor(name: str, device: str = "cpu") -> Features:
    """Return the function from images [batch, 3, height, width] in [-1, 1] to features [batch, width].

    Args:
        name: `package.module:function` of the user; or a CLIP model, by folder or name on the hub, with features of length 1,
            and of a video the mean of those of its frames.

    Raises InputError if it cannot be imported or loaded.
    """
    if FUNCTION.fullmatch(name):
        return import_function(name, "evaluation.features")
    return of_frames(Clip.load(name, device).image_features)


def features_of(images: Tensor, extract: Features, batch_size: int, device: str) -> Tensor:
    """Return the features [n, width] of images [n, ...], float64, on the CPU.

    Raises InputError if a user's function returns another shape or type, UserCodeError if it raises an exception.
    """

    def checked(part: Tensor) -> Tensor:
        with explained("evaluation.features"):
            found: Any = extract(part)
        if not isinstance(found, Tensor):
            raise InputError(f"evaluation.features must return a tensor [batch, width], got {type(found).__name__}")
        if found.ndim != 2 or len(found) != len(part):
            got = f"{list(found.shape)} for {len(part)} pictures"
            raise InputError(f"evaluation.features must return [batch, width], got {got}")
        return found

    return in_batches(checked, images, batch_size, device).double()


class _Identity(nn.Module):
    """Identity in place of torchmetrics' network: the features are computed already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return the Fréchet distance |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of Gaussian fits to features [n, d] and
    [m, d], by torchmetrics: FID (arXiv 1706.08500) in the features of an Inception network."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance(feature=_Identity(x.shape[1]))
    fid.update(y.double().cpu(), real=True)
    fid.update(x.double().cpu(), real=False)
    return float(fid.compute())


def frechet_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return `frechet_distance` of each of some groups of features [groups, n, d] and [groups, m, d]: [groups], float64.

    With A = (x - m_x) / sqrt(n - 1) the nonzero eigenvalues of C_x C_y = A'A B'B are the squared singular values of A B', of
    which there are min(n, m) and no d x d matrix: what a prompt's few pictures need.
    """
    x, y = x.double(), y.double()
    a, b = ((each - each.mean(1, keepdim=True)) / (each.shape[1] - 1) ** 0.5 for each in (x, y))
    shared = torch.linalg.svdvals(a @ b.mT).sum(1)
    means = (x.mean(1) - y.mean(1)).square().sum(1)
    distances: Tensor = means + a.square().sum((1, 2)) + b.square().sum((1, 2)) - 2 * shared
    return distances


def distances_to_reference(features: Tensor, reference: Tensor, seed: int = 0) -> dict[str, float]:
    """Return FID and KID (arXiv 1801.01401), by torchmetrics, between features [n, width] and those of a reference [m, width].

    FID falls with the number of pictures even if nothing else changes: compare it only at equal numbers. KID does not.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    fewest = min(len(features), len(reference))
    subsets = 1 if fewest <= MOST_KID else 100
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the memory of the features, which exist anyway
        kid = KernelInceptionDistance(feature=_Identity(features.shape[1]), subsets=subsets, subset_size=min(fewest, MOST_KID))
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws its subsets from the global generator
        torch.manual_seed(stream(seed, "kid").initial_seed())
        kid.update(reference.double(), real=True)
        kid.update(features.double(), real=False)
        return {"fid": frechet_distance(features, reference), "kid": kid.compute()[0].item()}
