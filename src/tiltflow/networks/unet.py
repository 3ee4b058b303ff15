"""A small U-Net for images, lean on CPUs: it works on 2x2 patches, adds its skips, and has no normalisation at all."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]


class Unet(Settings):
    """`blocks[0]` residual blocks of `channels[0]` on each side of `blocks[1]` of `channels[1]` at half the resolution."""

    name: Literal["unet"] = "unet"
    image_channels: Count = 1
    """Channels of the images, 1 or 3."""
    patch: Count = 2
    """Side of the squares of pixels that are folded into channels at the input."""
    channels: tuple[Count, Count] = (32, 96)
    """Channels at full and at half resolution."""
    blocks: tuple[Count, Count] = (1, 3)
    """Residual blocks on each side, and at half resolution."""
    embedding: Count = 64
    """Width of the embedding of time."""
    time_scale: Annotated[float, Field(gt=0)] = 1000.0
    """Factor on the network time before its sinusoidal embedding: 1000 for t in [0, 1], 1 for timesteps."""
    num_classes: Count | None = None
    """Number of classes of a class-conditional network, which takes labels too and adds their embedding to that of the time;
    null for an unconditional one."""

    def build(self) -> nn.Module:
        return UnetModule(self)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; time enters as a scale and a shift between them. Zero at the start, which takes the place of
    normalisation: on a CPU, group norms would cost as much as the convolutions in bfloat16."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.conv1(F.silu(x)), 1 + scale)
        return x + self.conv2(F.silu(h))  # type: ignore[no-any-return]


class UnetModule(nn.Module):
    """(images [batch, image_channels, height, width], time [batch]) -> the shape of the images; with `num_classes`, labels
    [batch] int64 are a third argument."""

    def __init__(self, settings: Unet):
        super().__init__()
        (c1, c2), (n1, n2), width = settings.channels, settings.blocks, settings.embedding
        pixels = settings.image_channels * settings.patch**2
        self.settings = settings
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.classes = None if settings.num_classes is None else nn.Embedding(settings.num_classes, width)
        self.enter = nn.Conv2d(pixels, c1, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(c1, width) for _ in range(n1))
        self.shrink = nn.Conv2d(c1, c2, 2, stride=2)
        self.middle = nn.ModuleList(ResidualBlock(c2, width) for _ in range(n2))
        self.grow = nn.ConvTranspose2d(c2, c1, 2, stride=2)
        self.up = nn.ModuleList(ResidualBlock(c1, width) for _ in range(n1))
        last = nn.Conv2d(c1, pixels, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.leave = nn.Sequential(nn.SiLU(), last)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        embedding = self.time(sinusoids(time * self.settings.time_scale, self.settings.embedding))
        if self.classes is not None:
            assert labels is not None
            embedding = embedding + self.classes(labels)
        h = self.enter(F.pixel_unshuffle(x, self.settings.patch).contiguous(memory_format=torch.channels_last))
        for block in self.down:
            h = block(h, embedding)
        deep = self.shrink(h)
        for block in self.middle:
            deep = block(deep, embedding)
        h = h + self.grow(deep)
        for block in self.up:
            h = block(h, embedding)
        return F.pixel_shuffle(self.leave(h), self.settings.patch)


def sinusoids(value: Tensor, width: int) -> Tensor:
    """[batch] -> [batch, width]: cosines and sines of `value` at frequencies from 1 to 1 / 10000."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=value.device, dtype=value.dtype) * (-math.log(10000.0) / half))
    angle = value[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=1)
