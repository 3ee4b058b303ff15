"""Frames of an episode: by MuJoCo's renderer where there is one, else drawn from above from where things are."""

# Mutation tests: test_episodes.py

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from ctypes.util import find_library
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageDraw

Picture = Image.Image
SIZE = 200
FRAMES = 6
"""Frames of an episode that are shown side by side."""
TABLE = ((0.2, 0.65), (-0.4, 0.4))
"""What is seen from above: away from the arm and across, in metres."""
COLOURS = ("#c0392b", "#2471a3", "#b7950b", "#7d3c98")
TRIAL = "import mujoco; mujoco.GLContext(8, 8)"


@runtime_checkable
class Rendered(Protocol):
    """An environment of gymnasium that draws itself."""

    render_mode: str | None

    def render(self) -> Any:
        """What it looks like: pixels [height, width, 3] where `render_mode` is rgb_array."""
        ...


@dataclass(frozen=True)
class Camera:
    """How an episode is filmed.

    Args:
        see: (environment, what it told at this step) -> what is kept of the moment; None where there is nothing to see.
        develop: (environment when the episode is over, what was kept) -> the picture.
        most: moments that are kept at most, and the last.
    """

    see: Callable[[Any, Mapping[str, Any]], Any]
    develop: Callable[[Any, Any], Picture]
    most: int


class Film:
    """Sees an episode (`evaluation.episodes.Watch`): evenly spaced frames, or where there are none the path of the first two
    numbers of what was observed.

    How long an episode will be is not known: every moment is kept, and where they are too many, every second, ..

    Args:
        count: of frames, the first and the last moment among them.
    """

    def __init__(self, camera: Camera, count: int = FRAMES):
        self.camera, self.count, self.stride = camera, count, 1
        self.moments = dict[int, Any]()
        self.frames = dict[int, Picture]()
        """By step, when the episode is over."""
        self.path = list[list[float]]()

    def __call__(self, environment: Any, observation: Any, info: Mapping[str, Any], over: bool) -> None:
        """See a step."""
        step = len(self.path)
        self.path.append([float(each) for each in np.asarray(observation).reshape(-1)[:2]])
        if step % self.stride == 0 or over:
            moment = self.camera.see(environment, info)
            self.moments |= {} if moment is None else {step: moment}
        if len(self.moments) > self.camera.most and not over:
            self.stride *= 2
            self.moments = {each: moment for each, moment in self.moments.items() if each % self.stride == 0}
        if over:
            chosen = evenly(self.moments, self.count)
            self.frames, self.moments = {each: self.camera.develop(environment, self.moments[each]) for each in chosen}, {}


def evenly(steps: Collection[int], count: int) -> list[int]:
    """So many of the steps, as evenly spaced as they allow, the first and the last among them."""
    places = np.linspace(0, max(steps, default=0), count)
    return sorted({min(steps, key=lambda each: abs(each - at)) for at in places}) if steps else []


def choose_renderer() -> None:
    """Ask MuJoCo for EGL, which needs no display, if it works and nothing else is asked for, before an environment is made.
    It is tried in a process of its own: a driver that fails may end it."""
    if "MUJOCO_GL" in os.environ or not find_library("EGL"):
        return
    command, surroundings = [sys.executable, "-c", TRIAL], {**os.environ, "MUJOCO_GL": "egl"}
    if subprocess.run(command, env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
        os.environ["MUJOCO_GL"] = "egl"


def frame(environment: Any, info: Mapping[str, Any]) -> Picture:
    """A picture of an environment of OGBench as it was when it told this. It is put there: its episode must be over."""
    if os.environ.get("MUJOCO_GL", "disable") == "disable":
        return from_above(info)
    buttons = [info["button_states"]] if "button_states" in info else []
    environment.unwrapped.set_state(info["qpos"], info["qvel"], *buttons)
    return Image.fromarray(np.asarray(environment.unwrapped.render())).resize((SIZE, SIZE))


def draws(environment: Any) -> bool:
    """Whether an environment of gymnasium draws itself: it was made with `render_mode="rgb_array"`."""
    return isinstance(environment, Rendered) and environment.render_mode == "rgb_array"


def rendered(environment: Any, info: Mapping[str, Any]) -> Picture | None:
    """A picture that an environment of gymnasium draws of itself, if it does."""
    if not draws(environment):
        return None
    picture = Image.fromarray(np.asarray(environment.render(), dtype=np.uint8)).convert("RGB")
    picture.thumbnail((SIZE, SIZE))
    return picture


OF_OGBENCH = Camera(lambda environment, info: info, frame, most=10_000)
OF_GYMNASIUM = Camera(rendered, lambda environment, picture: picture, most=64)


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
