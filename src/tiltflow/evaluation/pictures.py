"""What is left of a picture when a reward is hacked: the energy of its edges, the entropy of its colours, and of a video its
motion."""

# Mutation tests: test_monitor.py test_videos.py

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COLOURS = 64
"""Number of colours that are told apart: 4 levels of each of three channels; of one channel, as many greys."""


def are_pictures(x: Tensor) -> bool:
    """Return whether samples have the shape of pictures, [n, 1 or 3, height, width] of at least 2 x 2 pixels.

    >>> are_pictures(torch.zeros(5, 3, 8, 8)), are_pictures(torch.zeros(5, 2))
    (True, False)
    """
    return x.ndim == 4 and x.shape[1] in (1, 3) and min(x.shape[2:]) > 1


def is_video(shape: Sequence[int]) -> bool:
    """Return whether a sample of this shape is a video: [frames, 1 or 3, height, width].

    >>> is_video((5, 3, 8, 8)), is_video((3, 8, 8))
    (True, False)
    """
    return len(shape) == 4 and shape[1] in (1, 3)


def edge_energy(x: Tensor) -> Tensor:
    """Return the mean absolute difference [n] of neighbouring pixels of pictures x [n, channels, height, width] in [-1, 1], in
    units of the whole range: 0 for a plain picture, 1 for a chessboard of black and white."""
    p = _shown(x)
    across, down = (p.diff(dim=dim).abs().flatten(1) for dim in (3, 2))
    return torch.cat([across, down], 1).mean(1)


def colour_entropy(x: Tensor) -> Tensor:
    """Return the entropy [n], in nats, of the histogram of the colours of each picture: 0 if it has one colour alone, at most
    log(COLOURS)."""
    p = _shown(x)
    channels = p.shape[1]
    levels = round(COLOURS ** (1 / channels))
    digits = (p * levels).long().clamp(0, levels - 1).flatten(2)
    colours = (digits * levels ** torch.arange(channels, device=x.device)[:, None]).sum(1)
    shares = p.new_zeros(len(p), COLOURS).scatter_add_(1, colours, torch.ones_like(p[:, 0]).flatten(1)) / colours.shape[1]
    entropies: Tensor = torch.special.entr(shares).sum(1)
    return entropies


def motion(videos: Tensor) -> Tensor:
    """Return the mean absolute difference [n] of the pixels of neighbouring frames of videos [n, frames, channels, height,
    width] in [-1, 1], in units of the whole range: 0 for a video that stands still, or has one frame."""
    return _shown(videos).diff(dim=1).abs().flatten(1).sum(1) / max(1, videos[0, 1:].numel())


def _shown(x: Tensor) -> Tensor:
    """Pictures as a screen shows them: in [0, 1], nothing beyond."""
    shown: Tensor = (x.double().clamp(-1, 1) + 1) / 2
    return shown
