"""A plain convolutional classifier with 5x5 kernels and max pooling: unlike `residual_classifier`, so that it is an independent
judge."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]


class PlainClassifier(Settings):
    name: Literal["plain-classifier"] = "plain-classifier"
    image_channels: Count = 1
    """Channels of the images, 1 or 3."""
    image_size: Count = 28
    """Height and width in pixels."""
    classes: Count = 10
    """Number of classes."""
    channels: tuple[Count, Count] = (32, 64)
    """Channels of the two convolutions."""
    hidden: Count = 64
    """Width of the features."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Dropout rate of the features during training."""

    def build(self) -> nn.Module:
        return PlainClassifierModule(self)


class PlainClassifierModule(nn.Module):
    """Images [batch, image_channels, size, size] in [-1, 1] -> logits [batch, classes]."""

    def __init__(self, settings: PlainClassifier):
        super().__init__()
        c1, c2 = settings.channels
        self.conv1 = nn.Conv2d(settings.image_channels, c1, 5, padding=2)
        self.conv2 = nn.Conv2d(c1, c2, 5, padding=2)
        self.hidden = nn.Linear(c2 * (settings.image_size // 4) ** 2, settings.hidden)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(settings.hidden, settings.classes)

    def features(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.conv1(x)), 2)
        h = F.max_pool2d(F.relu(self.conv2(h)), 2)
        return F.relu(self.hidden(h.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x)))  # type: ignore[no-any-return]
