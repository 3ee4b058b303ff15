"""Experiment trackers: the metrics and pictures of a run in TensorBoard, Trackio or Weights & Biases.

The trackers are those of accelerate. They are optional: the run's folder has everything without them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tiltflow.errors import InputError, not_installed
from tiltflow.evaluation.metrics import described
from tiltflow.files import writing
from tiltflow.training.settings import TrackerName

LOGS, PROJECT = "logs", "tiltflow"
PICTURES = ("before", "after")
MODULES: dict[TrackerName, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


def check_tracker(name: TrackerName) -> None:
    """Raise InputError if a package that the tracker needs is not installed."""
    for needed in (("accelerate",), MODULES[name]):
        if not any(importlib.util.find_spec(module) for module in needed):
            raise not_installed(f"training.report_to {name}: {needed[0]}", name)


def legend() -> str:
    """Describe the curves of a training run in a Markdown table."""
    directions = {"up": "higher", "down": "lower", "none": ""}
    rows = [
        f"| {key} | {metric.title} | {metric.meaning} Expect: {metric.expect} | {directions[metric.better]} |"
        for key, metric in described("training").items()
    ]
    return "\n".join(["| curve | title | meaning | better |", "|---|---|---|---|", *rows])


@dataclass
class Tracker:
    """Reports a run to a tracker of accelerate."""

    tracker: Any

    @classmethod
    def start(cls, name: TrackerName, folder: Path, settings: Mapping[str, Any]) -> Tracker:
        """Start to report the run in `folder`, or resume its report.

        Args:
            settings: those of the recipe, by dotted keys.

        Raises InputError if the tracker refuses the run, for example because nobody is logged in.
        """
        from accelerate import tracking

        if name == "tensorboard":
            tracker: Any = tracking.TensorBoardTracker(LOGS, logging_dir=folder)
        elif name == "wandb":
            tracker = tracking.WandBTracker(PROJECT, name=folder.name, dir=str(folder))
        else:
            tracker = tracking.TrackioTracker(PROJECT, name=folder.name)
        simple = (bool, int, float, str)
        try:
            tracker.start()
            tracker.store_init_configuration(
                {key: value if isinstance(value, simple) else str(value) for key, value in settings.items()}
            )
            if name == "tensorboard":  # the only one that takes text
                tracker.log({"metrics": legend()}, step=0)
        except Exception as error:  # whatever the service's own module raises
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise InputError(f"training.report_to {name}: {reason}") from None
        return cls(tracker)

    def scalars(self, values: Mapping[str, Any], step: int, prefix: str = "") -> None:
        """Report the numbers among `values` at a step."""
        numbers = {prefix + key: value for key, value in values.items() if isinstance(value, (int, float))}
        with writing(f"training.report_to {self.tracker.name}"):
            self.tracker.log(numbers, step=step)

    def end(self, folder: Path, summary: Mapping[str, Any]) -> None:
        """Report the numbers of the summary and the pictures of a finished run."""
        step = summary["iterations"]
        self.scalars(summary, step, "summary/")
        for name in PICTURES:
            if (path := folder / f"{name}.png").exists():
                self._image(name, np.asarray(Image.open(path).convert("RGB")), step)
        self.tracker.finish()

    def _image(self, name: str, pixels: np.ndarray[Any, Any], step: int) -> None:
        """Report an image, pixels [height, width, 3]."""
        if self.tracker.name == "tensorboard":
            self.tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        elif self.tracker.name == "wandb":
            self.tracker.log_images({name: [pixels]}, step=step)
        else:
            import trackio

            self.tracker.log({name: trackio.Image(pixels)}, step=step)
