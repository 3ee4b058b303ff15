"""Scores of pictures as scores of videos: the mean over the frames."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def of_frames(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function of pictures [batch, channels, height, width] that takes videos too, [batch, frames, channels, height,
    width]: for them it is the mean over the frames, and each frame is told what its video is told.

    Args:
        score: score(pictures, **told) -> [batch, ...]; told are sequences of one entry for each picture, such as prompts.
    """

    def score_of_videos(x: Tensor, **told: Sequence[Any]) -> Tensor:
        if x.ndim != 5:
            return score(x, **told)
        frames = x.shape[1]
        each = {name: [one for one in several for _ in range(frames)] for name, several in told.items()}
        scores = score(x.flatten(0, 1), **each)
        return scores.reshape(len(x), frames, *scores.shape[1:]).mean(1)

    return score_of_videos
