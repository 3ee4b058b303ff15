"""Frames of an episode: by MuJoCo's renderer where there is one, else drawn from above from where things are."""

# Mutation tests: test_episodes.py

from __future__ import annotations

import os
from collections.abc import Mapping
from ctypes.util import find_library
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

Picture = Image.Image
SIZE = 200
TABLE = ((0.2, 0.65), (-0.4, 0.4))
"""What is seen from above: away from the arm and across, in metres."""
COLOURS = ("#c0392b", "#2471a3", "#b7950b", "#7d3c98")


def choose_renderer() -> None:
    """Ask MuJoCo for EGL, which needs no display, if it is there and nothing else is asked for, before one is made."""
    if find_library("EGL"):
        os.environ.setdefault("MUJOCO_GL", "egl")


def frame(environment: Any, info: Mapping[str, Any]) -> Picture:
    """A picture of an environment as it is now, [SIZE, SIZE].

    Args:
        info: what the environment told at this step.
    """
    if os.environ.get("MUJOCO_GL", "disable") != "disable":
        return Image.fromarray(np.asarray(environment.unwrapped.render())).resize((SIZE, SIZE))
    return from_above(info)


def from_above(info: Mapping[str, Any]) -> Picture:
    """The table from above: objects as squares, and the gripper as a ring, wider the higher it is."""
    picture = Image.new("RGB", (SIZE, SIZE), "white")
    draw = ImageDraw.Draw(picture)
    objects = [np.asarray(info[key]) for key in sorted(info) if key.startswith("privileged/") and key.endswith("_pos")]
    for i, place in enumerate(each for each in objects if each.shape == (3,)):
        draw.rectangle(_around(place, 8), fill=COLOURS[i % len(COLOURS)])
    if "proprio/effector_pos" in info:
        place = np.asarray(info["proprio/effector_pos"])
        draw.ellipse(_around(place, 5 + 40 * max(float(place[2]), 0.0)), outline="black", width=2)
    return picture


def _around(place: Any, radius: float) -> tuple[float, float, float, float]:
    """The square around a place [3], in pixels: the arm is at the top, and the left of the picture is its left."""
    (near, far), (right, left) = TABLE
    x, y = SIZE * (left - float(place[1])) / (left - right), SIZE * (float(place[0]) - near) / (far - near)
    return x - radius, y - radius, x + radius, y + radius
