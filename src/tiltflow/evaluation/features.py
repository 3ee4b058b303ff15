"""Features of pictures, in which sets of them are compared: how different the pictures of a prompt are, and how far tuned ones
are from real ones."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tiltflow.errors import InputError, not_installed
from tiltflow.evaluation.estimates import in_batches
from tiltflow.plugins import import_function
from tiltflow.rewards.backbones.clip import Clip
from tiltflow.streams import stream
from tiltflow.user_code import explained

MOST_KID = 1000
"""Pictures of a subset of KID, as its authors have it (1801.01401)."""

Features = Callable[[Tensor], Tensor]
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def feature_extractor(name: str, device: str = "cpu") -> Features:
    """Images [batch, 3, height, width] in [-1, 1] -> [batch, width], by name.

    Args:
        name: `package.module:function`, yours; or a CLIP model, a folder or a name on the hub, whose features have length 1.

    Raises InputError if it cannot be had.
    """
    if FUNCTION.fullmatch(name):
        return import_function(name, "evaluation.features")
    return Clip.load(name, device).image_features


def features_of(images: Tensor, extract: Features, batch_size: int, device: str) -> Tensor:
    """[n, width], float64, on the CPU. Raises InputError if a function of the user returns something else, UserCodeError if it
    raises an exception."""

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


class _AsTheyAre(nn.Module):
    """What torchmetrics calls its network: here the features are there already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def distances_to_reference(features: Tensor, reference: Tensor, seed: int = 0) -> dict[str, float]:
    """FID (1706.08500) and KID (1801.01401), by torchmetrics, of features [n, width] to [m, width].

    FID falls with the number of pictures even if nothing else changes: compare it at equal numbers only. KID does not.

    Raises InputError if torchmetrics is not installed.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError:
        raise not_installed("evaluation.reference: torchmetrics", "diffusers") from None
    network, fewest = _AsTheyAre(features.shape[1]), min(len(features), len(reference))
    whole = fewest <= MOST_KID
    fid = FrechetInceptionDistance(feature=network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that it keeps the features: they are here anyway
        kid = KernelInceptionDistance(feature=network, subsets=1 if whole else 100, subset_size=min(fewest, MOST_KID))
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws its subsets from the global generator
        torch.manual_seed(stream(seed, "kid").initial_seed())
        for metric in (fid, kid):
            metric.update(reference.double(), real=True)
            metric.update(features.double(), real=False)
        return {"fid": fid.compute().item(), "kid": kid.compute()[0].item()}
