"""Recipes: everything that a training run depends on, as a YAML file in the package, by name, or the user's own, by path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, model_validator

from tiltflow.conditions import Conditions, NamedConditions
from tiltflow.conditions.labels import Labels
from tiltflow.conditions.prompts import Prompts
from tiltflow.errors import InputError, did_you_mean
from tiltflow.evaluation.settings import Evaluation
from tiltflow.models.sources import ModelName, ModelSource, source_of
from tiltflow.plugins import run_around
from tiltflow.rewards import NamedReward
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import Settings, apply_overrides, read_yaml, validate
from tiltflow.shipped import by_name
from tiltflow.training.method import Method, NamedMethod
from tiltflow.training.optimizer import Optimizer, fill_optimizer, move_old_keys
from tiltflow.training.settings import Training

Kind = Literal["train", "pretrain"]
RECIPES = Path(str(resources.files("tiltflow"))) / "recipes"


def shipped_recipes(kind: Kind) -> dict[str, Path]:
    """The recipes inside the package, by name."""
    return {path.stem: path for path in sorted((RECIPES / kind).glob("*.yaml"))}


def find_recipe(name_or_path: str, kind: Kind) -> Path:
    """The file of a shipped recipe by name, or the user's own by path. Raises InputError if there is none."""
    shipped = shipped_recipes(kind)
    if found := by_name(name_or_path, shipped, "recipe"):
        return found
    path = Path(name_or_path)
    if path.is_dir() and (path / "recipe.yaml").exists():
        return path / "recipe.yaml"
    if path.exists() and not path.is_dir():
        return path  # a pipe too
    if path.suffix in (".yaml", ".yml"):
        raise InputError(f"{path}: no such file")
    other: Kind = "pretrain" if kind == "train" else "train"
    if name_or_path in shipped_recipes(other):
        raise InputError(f"{name_or_path!r} is a recipe for `tiltflow {other}`")
    raise InputError(f"there is no recipe {name_or_path!r}{did_you_mean(name_or_path, shipped)}; or give a .yaml file")


def read_recipe_tree(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings in a recipe file with `a.b=value` overrides applied, not yet validated."""
    tree = read_yaml(path)
    in_run = path.name == "recipe.yaml" and run_around(path.parent) == path.parent
    return apply_overrides(move_old_keys(tree) if in_run else tree, overrides)


class Recipe(Settings):
    """A training run, complete."""

    description: str = ""
    """A line for people: it is shown when the run begins, and in its report."""
    model: ModelName
    """A model that ships with tiltflow, or a model folder; `{path: .., adapter: ..}` trains a LoRA in it; `{diffusers: ..}` is
    a pipeline of diffusers."""
    prompts: Prompts | None = None
    """What a pipeline is asked for: `conditions` of the kind `prompts`."""
    conditions: NamedConditions | None = None
    """What samples are asked for, of any kind; by default all classes of a class-conditional model."""
    reward: NamedReward
    """What is tuned toward: `tiltflow settings` lists the rewards."""
    method: NamedMethod
    """How it is tuned: `tiltflow settings` lists the methods."""
    optimizer: Optimizer = Optimizer()
    """AdamW and its schedule."""
    training: Training = Training()
    """The loop."""
    sampling: Sampling | None = None
    """How the models are sampled for the evaluation: the first of evaluation.points."""
    evaluation: Evaluation = Evaluation()
    """What is measured after training."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The same seed, recipe, software and machine give the same result, bit for bit."""

    @model_validator(mode="after")
    def _fill_in(self) -> Recipe:
        prompted = self.source.prompted
        if self.prompts is not None and self.conditions is not None:
            raise ValueError("prompts and conditions both say what samples are asked for; give one of the two")
        if prompted and self.prompts is None and self.conditions is None:
            raise ValueError("prompts is missing")
        if not prompted and isinstance(self.asked_for, Prompts):
            raise ValueError("prompts: are for a pipeline, `model: {diffusers: ..}`, and this model is none; leave them out")
        if self.conditions is not None and self.training.classes:
            raise ValueError("training.classes and conditions both say what samples are asked for; give one of the two")
        training = self.training.for_prompts() if prompted else self.training.for_samples()
        evaluation = self.evaluation.for_prompts(self.sampling) if prompted else self.evaluation.for_samples(self.sampling)
        object.__setattr__(self, "optimizer", fill_optimizer(self.method, self.optimizer))
        object.__setattr__(self, "training", training)
        object.__setattr__(self, "evaluation", evaluation)
        object.__setattr__(self, "sampling", None)  # it is the first of evaluation.points now
        name = "num_generations" if prompted else "train_batch_size"
        if why := self.method.learns_nothing(size := getattr(training, name)):
            raise ValueError(f"training.{name} {size} teaches nothing: {why}; give 2 or more")
        return self

    @property
    def asked_for(self) -> Conditions:
        """What samples are asked for."""
        return self.conditions or self.prompts or Labels(classes=self.training.classes)

    @property
    def source(self) -> ModelSource[Any]:
        """Where the model comes from."""
        return source_of(self.model)

    @property
    def model_name(self) -> str:
        """The model, as a report says it."""
        return self.source.title

    @property
    def reward_name(self) -> str:
        """The reward, as a report says it."""
        return self.reward.name

    @property
    def reward_description(self) -> str:
        """The reward in a sentence."""
        return self.reward.description


class RunSettings(Protocol):
    """What is written down of a training run, whether a recipe or a program began it."""

    description: str
    method: Method
    optimizer: Optimizer
    training: Training
    evaluation: Evaluation
    seed: int

    @property
    def model_name(self) -> str: ...

    @property
    def reward_name(self) -> str: ...

    @property
    def reward_description(self) -> str: ...


def read_recipe(tree: Mapping[str, Any], where: str) -> Recipe:
    """A training recipe from its settings. Raises InputError, naming `where`, for the first thing that is wrong."""
    if "begun_by" in tree:
        raise InputError(f"{where}: {tree['begun_by']} began this run, in a program that has its model and reward; go on there")
    return validate(Recipe, tree, where)
