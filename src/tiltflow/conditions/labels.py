"""Class labels, the condition of class-conditional models: their networks get them as int64 [batch]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.errors import InputError, did_you_mean
from tiltflow.settings import Labels as Classes
from tiltflow.settings import Settings


class Labels(Settings):
    """The classes of a class-conditional model that are tuned."""

    name: Literal["labels"] = "labels"
    classes: Classes = ()
    """Numbers of the classes, from 0; all by default."""

    def items(self, class_names: Sequence[str], seed: int = 0) -> tuple[list[Item], list[Item]]:
        """Return (the classes in order, nothing held out); both empty for a model without classes.

        Raises InputError for a class that the model does not have.
        """
        count = len(class_names)
        classes = sorted(self.classes) or list(range(count))
        if not count and classes:
            raise InputError("training.classes: this model is not class-conditional; leave them out")
        if classes and classes[-1] >= count:
            raise InputError(f"training.classes names class {classes[-1]}, the model has 0 to {count - 1}")
        return [Item(class_names[i], {"label": i}) for i in classes], []


def as_labels(labels: Any, num_samples: int, class_names: Sequence[str]) -> Tensor:
    """Return labels [num_samples], int64, on the CPU.

    Args:
        labels: one class for all samples, by number or name; a sequence or tensor with one class per sample; or None for all
            classes in turn.

    Raises InputError for a class that does not exist and for anything else.
    """
    count = len(class_names)
    if labels is None:
        return torch.arange(num_samples) % count
    if isinstance(labels, Tensor):
        labels = labels.tolist()
    several = [labels] if isinstance(labels, (str, int)) else list(labels)
    numbers = [_number(label, class_names) for label in several]
    if len(numbers) not in (1, num_samples):
        raise InputError(f"labels: give one for all, or one for each of {num_samples} samples, got {len(numbers)}")
    return torch.tensor(numbers).expand(num_samples) if len(numbers) == 1 else torch.tensor(numbers)


def _number(label: Any, class_names: Sequence[str]) -> int:
    if isinstance(label, str) and label in class_names:
        return class_names.index(label)
    if isinstance(label, str):
        if not label.isdecimal():
            numbered = any(map(str.isdigit, label))  # "25 atoms" is near "15 atoms", and not meant to be it
            known = f"; known: {', '.join(list(dict.fromkeys(class_names))[:40])}"
            raise InputError(f"labels: there is no class {label!r}{known if numbered else did_you_mean(label, class_names)}")
        label = int(label)  # as written on a command line
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(class_names):
        raise InputError(f"labels: a class is a number from 0 to {len(class_names) - 1}, or its name, got {label!r}")
    return label


def draw_labels(classes: Sequence[int], num_samples: int, generator: torch.Generator) -> Tensor:
    """Draw labels [num_samples] for a batch: equally many of each of `classes`, and the remainder of random classes."""
    order = torch.randperm(len(classes), generator=generator, device=generator.device)
    turn = torch.arange(num_samples, device=generator.device) % len(classes)
    return torch.tensor(classes, device=generator.device)[order[turn]]
