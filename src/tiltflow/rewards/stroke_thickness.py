"""Thickness of strokes: area over half the perimeter, in pixels."""

# Mutation tests: test_rewards.py

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tiltflow.rewards import Reward
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.settings import Settings

# In ink, about three grey levels of 256: steps well below it count as noise rather than as an edge.
SMOOTHING = 0.01
# In pixels of perimeter: gives a blank image the thickness 0 and a finite gradient, and takes 1 % off a perimeter of 100.
LEAST_PERIMETER = 1.0


class StrokeThickness(Settings):
    """Mean thickness of bright strokes on a dark ground, 0 for a blank image, half its side for a full one."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "pixels"

    name: Literal["stroke-thickness"] = "stroke-thickness"
    sign: Literal["thicker", "thinner"] = "thicker"
    """Whether `thicker` strokes are better, or `thinner` ones."""

    @property
    def description(self) -> str:
        sign, side = ("", "above") if self.sign == "thicker" else ("minus the ", "below")
        return f"{sign}mean thickness of the bright strokes, {side} 0"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        direction = 1 if self.sign == "thicker" else -1

        def stroke_thickness(x: Tensor) -> Tensor:
            return direction * thickness(x)

        return of_frames(stroke_thickness)


def thickness(x: Tensor) -> Tensor:
    """area / (perimeter / 2) [batch] in pixels, of images [batch, channels, height, width] in [-1, 1].

    A stroke of width w and length L, straight or curved, has the area w L and the perimeter 2 L + 2 w, so the ratio is
    w / (1 + w / L): the width, a little low where strokes are short. Area is the sum of ink; perimeter is its total variation,
    which by the coarea formula is the perimeter of {ink > level} averaged over the levels from 0 to 1 (Rudin, Osher and Fatemi
    1992 for the functional). Both are linear in the strength of the ink, so faint strokes do not read as thin ones.
    A straight stroke 2 to 4 wide and at least 20 long reads within 15 % of its width, at any angle.
    """
    ink = F.pad((x.mean(1) + 1) / 2, (1, 1, 1, 1))  # blank around the image: where it cuts a stroke, there is an edge
    return 2 * ink.sum((1, 2)) / (perimeter(ink) + LEAST_PERIMETER)


def perimeter(ink: Tensor) -> Tensor:
    """Smoothed isotropic total variation [batch], in pixels, of ink [batch, height, width].

    The gradient of each 2x2 cell is taken along its two diagonals. Among the usual stencils this one depends least on the
    angle of an edge: forward differences read strokes of width 3, drawn at different angles, 20 % apart; this 6 %.
    """
    falling = ink[:, 1:, 1:] - ink[:, :-1, :-1]
    rising = ink[:, :-1, 1:] - ink[:, 1:, :-1]
    squared = (falling**2 + rising**2) / 2
    return ((squared + SMOOTHING**2).sqrt() - SMOOTHING).sum((1, 2))
