"""A value function of images: strided convolutions, with time as a scale and a shift after each, and one output."""

# Mutation tests: test_value.py

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.networks.unet import sinusoids
from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]


class ImageCritic(Settings):
    name: Literal["image-critic"] = "image-critic"
    image_channels: Count = 1
    """Channels of the images; of videos, those of all their frames."""
    image_size: tuple[Count, Count] = (28, 28)
    """Height and width, in pixels."""
    channels: tuple[Count, ...] = (32, 64, 64)
    """Channels of the convolutions; each halves the image."""
    embedding: Count = 64
    """Width of the embedding of time."""
    hidden: Count = 128
    """Width of the last hidden layer."""

    def build(self) -> nn.Module:
        return ImageCriticModule(self)


class ImageCriticModule(nn.Module):
    """(images [batch, image_channels, height, width], or videos [batch, channels, frames, height, width], time [batch] in
    [0, 1]) -> [batch, 1]; 0 at the start."""

    def __init__(self, settings: ImageCritic):
        super().__init__()
        widths = (settings.image_channels, *settings.channels)
        self.width = settings.embedding
        self.time = nn.Sequential(nn.Linear(self.width, self.width), nn.SiLU())
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.modulations = nn.ModuleList(nn.Linear(self.width, 2 * after) for after in settings.channels)
        height, width = (size // 2 ** len(settings.channels) for size in settings.image_size)
        self.hidden = nn.Linear(settings.channels[-1] * height * width, settings.hidden)
        self.head = nn.Linear(settings.hidden, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x.flatten(1, -3)
        embedding = self.time(sinusoids(1000 * time, self.width))
        for convolution, modulation in zip(self.convolutions, self.modulations, strict=True):
            scale, shift = modulation(embedding)[:, :, None, None].chunk(2, dim=1)
            x = F.silu(convolution(x) * (1 + scale) + shift)
        return self.head(F.silu(self.hidden(x.flatten(1))))  # type: ignore[no-any-return]
