"""Samples as one picture: a grid of pictures, rows of frames of videos, drawings of molecules."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from tiltflow.chemistry.atoms import molecules_of
from tiltflow.evaluation.molecules import is_molecule
from tiltflow.evaluation.pictures import is_video
from tiltflow.reports.plots import image_grid
from tiltflow.reports.videos import frames_in_rows


def can_be_drawn(shape: Sequence[int]) -> bool:
    """Whether samples of this shape are pictures, videos or molecules."""
    return (len(shape) == 3 and shape[0] in (1, 3)) or is_video(tuple(shape)) or is_molecule(tuple(shape))


def drawn(samples: Tensor, columns: int) -> Image.Image:
    """Samples [count, *event] that can be drawn in rows of `columns`; of a video each row is its frames.

    Raises InputError where molecules cannot be drawn without a package.
    """
    if is_molecule(samples.shape[1:]):
        from tiltflow.reports.molecules import molecule_grid

        return molecule_grid(molecules_of(samples), columns)
    return frames_in_rows(samples) if samples.ndim == 5 else image_grid(samples, columns)
