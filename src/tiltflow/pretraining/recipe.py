"""Pretraining recipes: what all kinds of pretraining have in common, and the task that a recipe describes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import Field, model_validator
from torch import nn

from tiltflow.errors import InputError, did_you_mean
from tiltflow.plugins import member, names
from tiltflow.pretraining.loop import Optimization, Stage
from tiltflow.runs.recipe import find_recipe, read_recipe_tree
from tiltflow.settings import Settings, validate

TASKS = "pretraining.tasks"
Scores = dict[str, float | list[float] | str]
"""What was measured, by name."""


class Task(Protocol):
    """Networks and data that a recipe has brought together: how they are trained, saved and measured."""

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """All networks that are saved, by name."""
        ...

    def stages(self) -> Iterator[Stage]:
        """Parts of the training, in order. A later one may depend on what an earlier one has trained."""
        ...

    def save(self, folder: Path, card: str) -> None:
        """Write the networks, from the CPU, and the card into an empty folder."""
        ...

    def scores(self) -> Scores:
        """Measure the trained networks on the CPU."""
        ...

    def data(self) -> str:
        """Size of the data, as the card says it."""
        ...

    def remarks(self) -> list[str]:
        """Sentences for the end of the card."""
        ...


class Pretraining(Settings):
    """Recipe of `tiltflow pretrain`. Each task adds its own settings in a file of `tiltflow/pretraining/tasks/`."""

    ELSEWHERE: ClassVar[Mapping[str, str]] = {}
    """Settings of other tasks that have no meaning in this one, each with the reason."""

    task: str
    """What is trained."""
    description: str = ""
    """A line for people; the model card begins with it."""
    training: Optimization = Optimization()
    """The optimizer and its schedule."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of all random draws. The same seed, recipe, software and machine give the same result, bit for bit."""

    @model_validator(mode="before")
    @classmethod
    def _say_why_not(cls, values: Any) -> Any:
        for key in values if isinstance(values, dict) else ():
            if key in cls.ELSEWHERE:
                raise ValueError(f"{key} has no meaning here: {cls.ELSEWHERE[key]}")
        return values

    @property
    def schedules(self) -> Mapping[str, Optimization]:
        """Optimizer settings of each stage, by its name, in order."""
        return {"training": self.training}

    @property
    def max_train_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(schedule.max_train_steps for schedule in self.schedules.values())

    @abstractmethod
    def prepare(self, path: Path, device: str) -> Task:
        """Read the data at `path` and build the networks on a device. Raises InputError if they do not fit."""


def read_pretraining(recipe: str, overrides: Sequence[str]) -> Pretraining:
    """Read and check a pretraining recipe, a shipped one by name or the user's own by path."""
    return pretraining_of(read_recipe_tree(find_recipe(recipe, "pretrain"), overrides), recipe)


def pretraining_of(tree: Mapping[str, Any], recipe: str) -> Pretraining:
    """Check a recipe as it was read from a file. Raises InputError, which names the recipe, if it is wrong."""
    task, known = tree.get("task"), names(TASKS)
    if task not in known:
        near = did_you_mean(str(task), known)
        listed = " or ".join((", ".join(map(repr, known[:-1])), repr(known[-1])))
        raise InputError(f"{recipe}: task must be {listed}{near if near.startswith(', did') else ''} (got {task!r})")
    return validate(kind_of(task), tree, recipe)


def kind_of(task: str) -> type[Pretraining]:
    """The class of the recipes with this task."""
    kind: type[Pretraining] = member(TASKS, task, "RECIPE")
    return kind
