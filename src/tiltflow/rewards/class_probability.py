"""Probability, by a classifier, that an image belongs to one of the wanted classes."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from tiltflow.rewards import Reward
from tiltflow.rewards.class_log_odds import Classes, ClassLogOdds, either
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.settings import PathOrName, Settings


class ClassProbability(Settings):
    """P(wanted), in [0, 1], as papers report it. `class-log-odds` has the better gradient: this one is flat at both ends."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "probability"

    name: Literal["class-probability"] = "class-probability"
    classifier: PathOrName = "digits-classifier"
    """The name of a classifier that ships with tiltflow, or the folder of another one."""
    classes: Classes
    """The wanted classes, by index from 0: at least one, and not all of the classifier's."""

    @property
    def description(self) -> str:
        return f"probability that the class is {either(self.classes)}, between 0 and 1"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Load the classifier. Raises InputError if it is missing or if `classes` does not suit it."""
        log_odds = ClassLogOdds(classifier=self.classifier, classes=self.classes, bound=None).build(device)

        def probability(x: Tensor) -> Tensor:
            return torch.sigmoid(log_odds(x))

        return of_frames(probability)
