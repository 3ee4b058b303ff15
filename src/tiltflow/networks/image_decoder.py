"""A decoder of latents into small images."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]


class ImageDecoder(Settings):
    name: Literal["image-decoder"] = "image-decoder"
    image_channels: Count = 1
    """Channels of the images, 1 or 3."""
    image_size: Annotated[int, Field(ge=4, multiple_of=4)] = 28
    """Height and width in pixels."""
    latents: Count = 16
    """Number of latents."""
    channels: Count = 32
    """Channels at half the resolution; twice as many below."""

    def build(self) -> nn.Module:
        return ImageDecoderModule(self)


class ImageDecoderModule(nn.Module):
    """Latents [batch, latents] -> images [batch, image_channels, size, size] in [-1, 1]."""

    def __init__(self, settings: ImageDecoder):
        super().__init__()
        c, side = settings.channels, settings.image_size // 4
        self.body = nn.Sequential(
            nn.Linear(settings.latents, 2 * c * side**2),
            nn.SiLU(),
            nn.Unflatten(1, (2 * c, side, side)),
            nn.ConvTranspose2d(2 * c, c, 4, 2, 1),
            nn.SiLU(),
            nn.Conv2d(c, c, 3, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(c, settings.image_channels, 4, 2, 1),
        )

    def log_odds(self, z: Tensor) -> Tensor:
        """Log-odds of white, of each pixel, of which the image is the mean."""
        return self.body(z)  # type: ignore[no-any-return]

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.log_odds(z) / 2)
