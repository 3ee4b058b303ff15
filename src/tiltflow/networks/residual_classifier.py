"""A residual image classifier without batch statistics: smooth in its input, so its logits make a usable reward gradient."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]


class ResidualClassifier(Settings):
    name: Literal["residual-classifier"] = "residual-classifier"
    image_channels: Count = 1
    """Channels of the images, 1 or 3."""
    classes: Count = 10
    """Number of classes."""
    channels: tuple[Count, ...] = (24, 48, 96)
    """Channels of the stages; each halves the image."""

    def build(self) -> nn.Module:
        return ResidualClassifierModule(self)


class Stage(nn.Module):
    """Halve the image, then one residual block."""

    def __init__(self, before: int, channels: int):
        super().__init__()
        self.shrink = nn.Conv2d(before, channels, 3, stride=2, padding=1)
        self.norm1, self.conv1 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shrink(x)
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))  # type: ignore[no-any-return]


class ResidualClassifierModule(nn.Module):
    """Images [batch, image_channels, height, width] in [-1, 1] -> logits [batch, classes]."""

    def __init__(self, settings: ResidualClassifier):
        super().__init__()
        widths = (settings.image_channels, *settings.channels)
        self.stages = nn.ModuleList(Stage(before, after) for before, after in pairwise(widths))
        self.head = nn.Linear(widths[-1], settings.classes)

    def features(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return F.silu(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]
