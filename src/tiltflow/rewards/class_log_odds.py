"""Log-odds, by a classifier, that an image belongs to one of the wanted classes."""

# Mutation tests: test_rewards.py

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.models.model_folder import load_classifier
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.settings import Labels, PathOrName, Settings


def _some(classes: tuple[int, ...]) -> tuple[int, ...]:
    if not classes:
        raise ValueError("needs at least one class, for example [0, 2, 4]")
    return classes


Classes = Annotated[Labels, AfterValidator(_some)]


def either(classes: tuple[int, ...]) -> str:
    """The classes in words: `1, 2 or 3`."""
    labels = [str(label) for label in classes]
    return " or ".join(part for part in (", ".join(labels[:-1]), labels[-1]) if part)


class ClassLogOdds(Settings):
    """log P(wanted) - log P(not wanted) in nats: 0 is undecided, 2.2 is 9 to 1, and `bound` is approached but never reached."""

    differentiable: ClassVar[bool] = True
    learned: ClassVar[bool] = False
    unit: ClassVar[str] = "nats"

    name: Literal["class-log-odds"] = "class-log-odds"
    classifier: PathOrName = "digits-classifier"
    """The name of a classifier that ships with tiltflow, or the folder of another one."""
    classes: Classes
    """The wanted classes, by index from 0: at least one, and not all of the classifier's."""
    bound: Annotated[float, Field(gt=0)] | None = 10.0
    """Largest absolute value, in nats; null for no bound. Without one, a few extreme samples can outweigh all others."""

    @property
    def description(self) -> str:
        limit = "unbounded" if self.bound is None else f"bounded to ±{self.bound:g}"
        return f"log-odds that the class is {either(self.classes)}; above 0 the classifier says yes, {limit}"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """Load the classifier. Raises InputError if it is missing or if `classes` does not suit it."""
        network, config = load_classifier(self.classifier, device)
        count = len(config.class_names)
        if max(self.classes) >= count:
            raise InputError(
                f"class-log-odds: no class {max(self.classes)}; the classes of {self.classifier} are 0 to {count - 1}"
            )
        if len(self.classes) == count:
            raise InputError(f"class-log-odds: these are all {count} classes of {self.classifier}; leave out at least one")
        wanted = torch.tensor(self.classes, device=device)
        others = torch.tensor([label for label in range(count) if label not in self.classes], device=device)
        dtype = next(network.parameters()).dtype

        def log_odds(x: Tensor) -> Tensor:
            return bounded(class_log_odds(network(x.to(dtype)), wanted, others), self.bound)

        return of_frames(log_odds)


def class_log_odds(logits: Tensor, wanted: Tensor, others: Tensor) -> Tensor:
    """log P(wanted) - log P(others) [batch] in nats, from logits [batch, classes] and the indices of two sets of classes.

    The normaliser of the softmax cancels, so neither probability is ever formed and none can round to 0 or 1.
    """
    return logits[:, wanted].logsumexp(1) - logits[:, others].logsumexp(1)


def bounded(value: Tensor, bound: float | None) -> Tensor:
    """value / sqrt(1 + (value / bound)^2): odd, strictly increasing, within ± bound; `value` itself if there is no bound.

    Within bound / 4 it differs from `value` by 3 % at most. Its slope (1 + (value / bound)^2)^(-3/2) falls like the cube of
    bound / value, so samples far on the wrong side still feel a pull; that of bound * tanh(value / bound) falls like
    exp(-2 value / bound) and soon leaves none.
    """
    return value if bound is None else value * torch.rsqrt(1 + (value / bound) ** 2)
