"""An encoder of small images: the mean and the log variance of a Gaussian of latents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]


class ImageEncoder(Settings):
    name: Literal["image-encoder"] = "image-encoder"
    image_channels: Count = 1
    """Channels of the images, 1 or 3."""
    image_size: Annotated[int, Field(ge=4, multiple_of=4)] = 28
    """Height and width in pixels."""
    latents: Count = 16
    """Number of latents."""
    channels: Count = 32
    """Channels at half the resolution; twice as many below."""

    def build(self) -> nn.Module:
        return ImageEncoderModule(self)


class ImageEncoderModule(nn.Module):
    """Images [batch, image_channels, size, size] in [-1, 1] -> (means, log variances) [batch, latents]."""

    def __init__(self, settings: ImageEncoder):
        super().__init__()
        c, side = settings.channels, -(-settings.image_size // 8)
        self.body = nn.Sequential(
            nn.Conv2d(settings.image_channels, c, 3, 2, 1),
            nn.SiLU(),
            nn.Conv2d(c, 2 * c, 3, 2, 1),
            nn.SiLU(),
            nn.Conv2d(2 * c, 2 * c, 3, 2, 1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * c * side**2, 2 * settings.latents),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.body(x).chunk(2, 1)
        return mean, log_variance.clamp(-12, 4)
